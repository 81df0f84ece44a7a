# SPDX-License-Identifier: Apache-2.0
"""What holds for the package as a whole: a light import, early answers on the command line, rules of the source."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import nemo_mtbi
from nemo_mtbi.commands import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nemo_mtbi"
HEAVY = ("torch", "nemo", "megatron", "transformers", "lightning", "lhotse", "numpy")


def run_python(code: str, *args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` as ``python -c`` would, in a process that has loaded nothing yet."""
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def python_files(*folders: str) -> list[Path]:
    return [ROOT / "setup.py", *(p for folder in folders for p in sorted((ROOT / folder).rglob("*.py")))]


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every module or name that the code imports, dotted: ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# --- import ---------------------------------------------------------------------------------------------------------


def test_import_is_quick_and_loads_nothing_heavy():
    code = """
        import json, sys, time
        start = time.process_time()  # of this process alone, whatever else the machine does
        import nemo_mtbi
        seconds = time.process_time() - start
        print(json.dumps([seconds, sorted(m for m in sys.modules if "." not in m), nemo_mtbi.__version__]))
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    seconds, modules, version = json.loads(done.stdout)
    assert seconds < 1.0
    assert not set(modules) & set(HEAVY)
    assert version == nemo_mtbi.__version__


def test_public_names_are_listed_and_unknown_ones_refused():
    assert set(nemo_mtbi.__all__) <= set(dir(nemo_mtbi))
    with pytest.raises(AttributeError, match="no attribute 'NoSuchModel'"):
        _ = nemo_mtbi.NoSuchModel


def test_lazy_name_is_loaded_once(monkeypatch, tmp_path):
    (tmp_path / "lazy_target_of_test.py").write_text("Thing = object()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(nemo_mtbi._LAZY, "Thing", "lazy_target_of_test")
    thing = nemo_mtbi.Thing
    assert thing is sys.modules["lazy_target_of_test"].Thing
    assert vars(nemo_mtbi).pop("Thing") is thing
    del sys.modules["lazy_target_of_test"]


def is_installed() -> bool:
    try:
        importlib.metadata.version("nemo_mtbi")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_install = pytest.mark.skipif(not is_installed(), reason="nemo_mtbi is on the path but not installed")

# --- set-up ---------------------------------------------------------------------------------------------------------


@needs_install
def test_metadata_of_the_installed_package():
    meta = importlib.metadata.metadata("nemo_mtbi")
    requires = importlib.metadata.requires("nemo_mtbi")
    assert meta["Version"] == nemo_mtbi.__version__
    assert set(meta.get_all("Provides-Extra")) >= {"demo", "test", "apex"}
    # PyPI's `apex` is another project: the name may appear with NVIDIA's address only.
    assert [r for r in requires if re.match(r"apex\b", r) and "github.com/NVIDIA/apex" not in r] == []


def test_every_constraint_pins_one_public_version():
    lines = [line.split("#")[0].strip() for line in (ROOT / "conf/constraints.txt").read_text().splitlines()]
    pins = [line for line in lines if line]
    assert len(pins) > 20
    for pin in pins:  # a local version such as +cpu exists on one index only
        assert re.fullmatch(r"[\w.-]+==[\d.]+(post\d+)?", pin), pin


def shell(code: str, **env: str) -> str:
    """Runs bash code with scripts/lib.sh loaded; this interpreter is ``python``."""
    bin_folder = str(Path(sys.executable).parent)
    full = {**os.environ, "PATH": bin_folder + os.pathsep + os.environ["PATH"], "REPO": str(ROOT), **env}
    command = ["bash", "-euo", "pipefail", "-c", f'source "$REPO/scripts/lib.sh"\n{code}']
    done = subprocess.run(command, env=full, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


INSTALL_LOG = """
    require_pip() { :; }
    install_torch() { echo torch; }
    effective_constraints() { :; }
    install_package() { [[ ${BROKEN:-} ]] && return 1; echo "package $2"; }
"""


def test_install_is_done_once_and_again_when_it_must(tmp_path):
    def install(extras: str, **env: str) -> str:
        return shell(f"{INSTALL_LOG}\nensure_install {extras}", VIRTUAL_ENV=str(tmp_path), NEMO_VERSION="", **env)

    assert "package demo\n" in install("demo")
    assert install("demo") == ""
    assert "package demo,test,demo\n" in install("demo,test")
    assert install("demo") == install("test") == install("demo,test") == ""
    assert "package demo\n" in install("demo", TORCH_SPEC="torch==2.12.0")  # other requirements: all over again
    with pytest.raises(AssertionError):
        install("demo", BROKEN="1")
    assert "package demo\n" in install("demo")  # an install that failed leaves no stamp


def test_a_virtual_environment_of_other_requirements_is_removed(tmp_path):
    def kept(**env: str) -> bool:
        shell(f'remove_stale_venv "{tmp_path}/v"', NEMO_VERSION="", **env)
        return (tmp_path / "v").exists()

    assert not kept()  # there is none
    (tmp_path / "v").mkdir()
    shell(f'requirements_digest >"$(stamp_of "{tmp_path}/v")"', NEMO_VERSION="")
    assert kept()
    assert not kept(TORCH_SPEC="torch==2.12.0")
    (tmp_path / "v").mkdir()
    assert not kept(), "an installation that was cut short"


@needs_install
def test_another_nemo_gets_its_own_environment_and_looser_pins(tmp_path):
    base = {"NEMO_MTBI_VENV": str(tmp_path / "v")}
    assert shell("venv_path", NEMO_VERSION="", **base).strip() == str(tmp_path / "v")
    assert shell("venv_path", NEMO_VERSION="2.7.3", **base).strip() == str(tmp_path / "v") + "-nemo2.7.3"
    pins = shell("effective_constraints", NEMO_VERSION="2.7.3")
    assert "lhotse==" in pins and "transformers==" not in pins and "nemo_toolkit==" not in pins
    assert f"torch=={importlib.metadata.version('torch')}\n" in pins
    names = shell("our_requirements demo", NEMO_VERSION="2.7.3")
    assert "espeakng-loader" in names and "megatron-core>=0.16" in names
    assert "nemo_toolkit" not in names and "hypothesis" not in names


# --- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the package as its wheel installs it; the dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave_out = shutil.ignore_patterns(".*", "tests", "build", "*.egg-info", "__pycache__", "nemo_experiments")
    shutil.copytree(ROOT, source, ignore=leave_out)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=600)
    (wheel,) = folder.glob("*.whl")
    unpack = [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(unpack, check=True, capture_output=True, timeout=600)
    shutil.rmtree(source)  # nothing of it may be needed
    return folder / "site"


@pytest.fixture
def mtbi(installed, tmp_path):
    """Runs the installed command in an empty folder, with another home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("NEMO_MTBI_CACHE", None)

    def run(*words: str) -> str:
        command = [sys.executable, str(installed / "bin" / "mtbi"), *words]
        done = subprocess.run(
            command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


@pytest.mark.slow
def test_a_wheel_holds_the_configurations_and_answers_at_once(mtbi, installed):
    for path in (ROOT / "conf").rglob("*.*"):
        assert (installed / "nemo_mtbi" / "conf" / path.relative_to(ROOT / "conf")).read_bytes() == path.read_bytes()
    assert (installed / "nemo_mtbi" / "py.typed").is_file()
    assert "transcribe" in mtbi("--help")
    assert mtbi("train", "--cfg", "job", "+rival=continuation").startswith("name: mtbi_demo\n")
    where = f"Each key is explained in {installed / 'nemo_mtbi' / 'conf' / 'mtbi_eval.yaml'}"
    assert where in mtbi("evaluate", "--help")


@pytest.mark.slow
def test_a_wheel_trains_and_transcribes_in_an_empty_folder(mtbi, tmp_path):
    import numpy as np
    import soundfile

    sizes = ("data.train_utterances=20", "data.validation_utterances=2", "data.test_utterances=2")
    out = mtbi("train", "trainer.max_steps=2", "trainer.val_check_interval=2", *sizes)
    results = Path(out.splitlines()[-1].removeprefix("results: "))
    assert set(json.loads((tmp_path / "work" / results).read_text())) >= {"seed", "train", "behavior"}
    soundfile.write(tmp_path / "work" / "a.wav", np.sin(np.arange(16000) / 20) / 4, 16000)
    model = str(results.with_name("mtbi_demo.nemo"))
    said = mtbi("transcribe", f"model_path={model}", "audio=a.wav", "prompt=please transcribe this", "cuda=-1")
    answers = Path(said.splitlines()[-1].removeprefix("answers: "))
    assert json.loads(answers.read_text())["audio_filepath"] == "a.wav"


# --- command line ---------------------------------------------------------------------------------------------------

SCRIPT = '''
    """Trains a thing.

    And says so at length.
    """
    import sys
    from pathlib import Path

    sys.addaudithook(lambda event, args: event == "import" and args[0] in BANNED and sys.exit(f"imported {args[0]}"))

    from nemo_mtbi.commands.cli import hydra_main


    @hydra_main(config_name="thing", config_path=Path(__file__).resolve().parent / "conf")
    def main(cfg):
        print("ran with", cfg.size, cfg.twice, "nemo" in sys.modules)


    if __name__ == "__main__":
        main()
'''


@pytest.fixture
def script(tmp_path):
    """Runs a script like those in examples/ with arguments; ``banned`` modules end it when it imports them."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/thing.yaml").write_text("size: 3\ntwice: ${multiply:${size},2}\n")
    work = tmp_path / "work"
    work.mkdir()

    def run(*args: str, banned: tuple[str, ...] = ("torch", "nemo")) -> subprocess.CompletedProcess[str]:
        source = textwrap.dedent(SCRIPT).replace("BANNED", repr(banned))
        (tmp_path / "script.py").write_text(source)
        command = [sys.executable, str(tmp_path / "script.py"), *args]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=300)
        assert list(work.iterdir()) == [], "the run left files behind"
        return done

    return run


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_description_and_keys_without_nemo(script, flag):
    done = script(flag)
    assert done.returncode == 0, done.stderr
    assert "And says so at length." in done.stdout
    assert "size: 3" in done.stdout
    assert "thing.yaml" in done.stdout
    assert "ran with" not in done.stdout


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--cfg", "job", "size=5"], "size: 5"),
        (["-c", "job", "--resolve", "size=5"], "twice: 10"),
        (["--info", "searchpath"], "conf"),
        (["--hydra-help"], "--hydra-help"),
        (["--shell-completion", "install=bash"], "complete"),
        (["--version"], "Hydra"),
    ],
)
def test_questions_are_answered_without_nemo(script, args, expected):
    done = script(*args)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert "ran with" not in done.stdout


def test_the_ban_on_nemo_above_works(script):
    assert "imported nemo" in script("size=5").stderr


def test_unknown_flag_is_refused_without_nemo(script):
    done = script("--epochs", "3")
    assert done.returncode == 2
    assert "unrecognized arguments: --epochs" in done.stderr


def test_run_goes_through_nemo_quietly_and_leaves_no_folder(script):
    done = script("size=7", banned=())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ran with 7 14 True"
    assert "Warning" not in done.stderr + done.stdout


def test_decorated_function_takes_a_config():
    seen = []
    main = cli.hydra_main(config_name="thing", config_path=ROOT / "conf")(seen.append)
    main({"size": 1})
    assert seen == [{"size": 1}]


def test_relative_config_path_is_refused():
    with pytest.raises(ValueError, match="must be absolute"):
        cli.hydra_main(config_name="thing", config_path="../conf")


def test_quiet_hides_start_up_noise_but_not_ours():
    code = """
        import logging, warnings
        from nemo_mtbi.commands.cli import quiet

        def warn(category, text, module):
            warnings.warn_explicit(text, category, "file.py", 1, module=module, registry={})

        quiet()
        warn(UserWarning, "Apex is not installed. Falling back", "megatron.core.optimizer")
        warn(FutureWarning, "will change", "torch.foo")
        warn(UserWarning, "GPU available but not used", "lightning.pytorch.trainer")
        warn(UserWarning, "heard-user", "nemo_mtbi.data.dataset")
        warn(FutureWarning, "heard-future", "nemo_mtbi.data.dataset")
        logging.getLogger("lightning.pytorch.utilities.rank_zero").info("GPU available: False")
        logging.getLogger("nv_one_logger.api.config").warning("Setting error_handling_strategy")
        logging.getLogger("lightning.pytorch").error("heard-error")
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    heard = [word for word in ("heard-user", "heard-future", "heard-error") if word in done.stderr]
    assert heard == ["heard-user", "heard-future", "heard-error"]
    for noise in ("Apex", "will change", "GPU", "error_handling_strategy"):
        assert noise not in done.stderr


@pytest.mark.parametrize(("value", "expected"), [(None, True), ("", True), ("0", True), ("1", False)])
def test_verbose_is_asked_for_by_environment(monkeypatch, value, expected):
    if value is None:
        monkeypatch.delenv(cli.VERBOSE_ENV, raising=False)
    else:
        monkeypatch.setenv(cli.VERBOSE_ENV, value)
    assert cli.wants_quiet() is expected


# --- rules of the source --------------------------------------------------------------------------------------------


def parallel_state_readers(source: str) -> list[str]:
    """The imports and attribute accesses by which ``source`` gets at Megatron's ``parallel_state``."""
    tree = ast.parse(source)
    names = [n for n in imported_names(tree) if re.match(r"megatron\.core\.(parallel_state|mpu)\b", n)]
    nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("parallel_state", "mpu"))
    return names + [ast.unparse(n) for n in nodes]


@pytest.mark.parametrize(
    "source",
    [
        "from megatron.core import parallel_state",
        "from megatron.core.parallel_state import get_tensor_model_parallel_rank",
        "def f():\n    import megatron.core.parallel_state as ps",
        "import megatron.core\nmegatron.core.parallel_state.destroy_model_parallel()",
    ],
)
def test_every_way_to_parallel_state_is_seen(source):
    assert parallel_state_readers(source)


def test_only_parallel_reads_megatrons_parallel_state():
    found = {
        str(path.relative_to(ROOT)): readers
        for path in python_files("nemo_mtbi", "examples")
        if PACKAGE / "parallel" not in path.parents and (readers := parallel_state_readers(path.read_text()))
    }
    assert found == {}


def test_package_imports_no_examples_scripts_or_tests():
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in python_files("nemo_mtbi")
        for name in imported_names(ast.parse(path.read_text()))
        if name.split(".")[0] in ("examples", "scripts", "tests")
    }
    assert found == set()


def test_data_imports_no_framework_at_the_top():
    found = set()
    for path in sorted(
        path for name in ("data", "layouts", "chat", "targets") for path in (PACKAGE / name).glob("*.py")
    ):
        tree = ast.parse(path.read_text())
        tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        tops = {name.split(".")[0] for name in imported_names(tree)}
        found |= {f"{path.name}: {top}" for top in tops & {"nemo", "megatron", "transformers", "lightning"}}
    assert found == set()


def test_every_file_names_its_license():
    files = python_files("nemo_mtbi", "examples", "scripts", "tests")
    assert len(files) > 10
    for path in files:
        head = path.read_text().splitlines()[:2]  # the first line may name the interpreter
        assert "# SPDX-License-Identifier: Apache-2.0" in head, path
