# SPDX-License-Identifier: Apache-2.0
"""Parts of hostile archives, and a watch over what the interpreter does while one is opened."""

from __future__ import annotations

import base64
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECRET_NAME, SECRET = "MTBI_HOSTILE_SECRET", "5ecret-of-the-environment"


class Runs:
    """Runs a command where it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def raw_texts(canary: Path) -> list[str]:
    """YAML scalars that ask for the environment or for code, in all the ways of writing them."""
    read = f"oc.env:{SECRET_NAME}"
    tagged = base64.b64encode(f"${{{read}}}".encode()).decode()
    return [
        f"'${{{read}}}'",
        f'"\\x24{{{read}}}"',
        f'"\\u0024{{{read}}}"',
        f'"\\U00000024{{{read}}}"',
        f'"$\\x7b{read}}}"',
        f'"\\x24\\x7b{read}\\x7d"',
        f'"before \\x24{{{read}}} behind"',
        f'"\\x24{{oc.decode:\\x24{{{read}}}}}"',
        f'"\\\\\\x24{{{read}}}"',
        '"\\x24{target}"',
        f"!!binary {tagged}",
        f'!!python/object/apply:os.system ["touch {canary}"]',
        f'!!python/object/new:os.system ["touch {canary}"]',
        "!!python/name:os.system ''",
        "&anchor [1, 2]",
        "*anchor",
        "0x" + "f" * 5000,
        "[" * 200 + "]" * 200,
    ]


def sections(canary: Path, repository: Path) -> list[dict[str, Any]]:
    """Sections of a configuration that would call what they name."""
    command = {"command": f"touch {canary}"}
    tokenizer = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
    foreign = {"pretrained_model_name": str(repository), "trust_remote_code": True}
    names = [
        "os.system",
        "nemo.collections.asr.parts.utils.vad_utils.os.system",
        "nemo.collections.asr.modules.conformer_encoder.os.system",
        "torch.optim.os.system",
        "nemo.core.optim.os.system",
        "nemo_mtbi.io.atomic.os.system",
    ]
    settings = [{key: name, **command} for name in names for key in ("_target_", "target")]
    settings += [{"cls": name, "params": command} for name in names[:2]]
    settings += [
        {"_target_": tokenizer, **foreign},
        {"_target_": "nemo.collections.asr.modules.ConformerEncoder", "_args_": [{"_target_": tokenizer, **foreign}]},
        {"_target_": tokenizer, "_partial_": True, **foreign},
        {"_target_": "builtins.exec", "_args_": [f"import os; os.system('touch {canary}')"]},
        {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.system", **command}},
        {"_target_": "nemo.collections.asr.models.ASRModel.restore_from", "restore_path": str(canary)},
        {"_target_": "nemo.core.classes.common.Serialization.from_config_dict", "config": {"target": "os.system"}},
        {"type": "wpe", "dir": str(repository), "hf_kwargs": {"pretrained_model_name": str(repository)}},
        {"cuts_path": f"pipe:touch {canary}; cat /dev/null", "batch_size": 1},
        {"manifest_filepath": "/etc/passwd", "sample_rate": 16000},
    ]
    return settings


VALUES = [
    2**20,
    10**9,
    2**62,
    -1,
    0,
    1e308,
    float("nan"),
    float("inf"),
    "???",
    "/etc/passwd",
    "../../../outside",
    "(a+)+$",
    "(" * 500,
    "nemo:../../outside",
    "\x00",
    [[]] * 300,
    {},
    None,
    True,
    "x" * 5000,
]
KEYS = ["_target_", "_args_", "_partial_", "_recursive_", "_convert_", "target", "cls", "params", "trust_remote_code"]
KEYS += ["pretrained_model", "init_from_nemo_model", "train_ds", "optim", "encoder_cache", "tokenizer", "lora", "llm"]
KEYS += ["tensor_model_parallel_size", "chat", "generation", "encoder", "adapters", "custom_tokenizer", "decoding"]
MEMBERS = ["evil.py", "sitecustomize.py", "../outside", "/tmp/outside", "llm/evil.py", "a/../../outside", "x" * 300]
MEMBERS += ["model_weights.ckpt", "pytorch_model.bin", "model_config.yaml", "tokenizer_config.json", "\u202eexe.nemo"]


def evil_repository(folder: Path, canary: Path) -> Path:
    """A directory like one of the hub, whose tokenizer is code of its own."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bert", "auto_map": {"AutoConfig": "evil.EvilConfig"}}')
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", null]}}'
    )
    code = "from transformers import BertConfig, BertTokenizer\n"
    code += "class EvilConfig(BertConfig): pass\nclass EvilTokenizer(BertTokenizer): pass\n"
    (folder / "evil.py").write_text(f"import os\nos.system('touch {canary}')\n{code}")
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    return folder


class Watch:
    """Events that the interpreter reports of this thread: processes, sockets, and files that are written elsewhere."""

    def __init__(self, folder: Path):
        self.folder, self.seen, self._thread = str(folder.resolve()), [], None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if self._thread != threading.get_ident():
            return
        if event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn", "socket.connect"):
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event in ("open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate"):
            path, mode = arguments[0], arguments[1] if event == "open" else "w"
            written = isinstance(mode, str) and set(mode) & set("wax+")
            written = written or event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if written and isinstance(path, (str, bytes, os.PathLike)):
                real = os.path.realpath(os.fsdecode(path))
                if not real.startswith((self.folder, "/dev/")) and "__pycache__" not in real:
                    self.seen.append(f"{event} {real}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Report what this thread does in the body."""
        self.seen.clear()
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None
