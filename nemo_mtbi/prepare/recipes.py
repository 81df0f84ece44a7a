# SPDX-License-Identifier: Apache-2.0
"""From a corpus as it is published to cuts: any recipe of Lhotse, and NeMo manifests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lhotse import CutSet, Recording, RecordingSet, SupervisionSet
from lhotse.cut.data import DataCut
from lhotse.utils import fastcopy

from nemo_mtbi.data.entries import BadEntryError
from nemo_mtbi.data.gate import GatedCuts, open_manifest
from nemo_mtbi.data.manifest_lines import EntryFilter
from nemo_mtbi.data.nemo_cuts import EDGE, promised_seconds, restore_piece
from nemo_mtbi.io.manifests import check_manifest
from nemo_mtbi.io.reading import Reading
from nemo_mtbi.io.sources import FILES, ForbiddenSourceError, SourcePolicy
from nemo_mtbi.io.text import in_one_line


def open_cuts(path: str | Path, policy: SourcePolicy = FILES, skip: bool = False) -> tuple[GatedCuts, int]:
    """Return the cuts of a manifest, read lazily, and how many there are.

    Args:
        path: of the manifest.
        policy: what the cuts may be read from.
        skip: leave entries out whose values are of a wrong type, and count them in ``left_out``.

    Raises:
        ValueError: as :func:`nemo_mtbi.data.gate.open_manifest`, for all of the manifest.
    """
    cuts = open_manifest(path, policy, skip, "leave it out with --on-bad-audio skip")
    return cuts, sum(1 for _ in cuts)


def recipe_names() -> list[str]:
    """Return the names of the recipes of the installed Lhotse."""
    import lhotse.recipes

    return sorted(name.removeprefix("prepare_") for name in dir(lhotse.recipes) if name.startswith("prepare_"))


def cuts_of_recipe(name: str, corpus_dir: str | Path, options: Mapping[str, Any] = {}) -> dict[str, CutSet]:  # noqa: B006 (only read)
    """Return the parts of a corpus by a recipe of Lhotse, one cut for each utterance.

    Args:
        name: such as ``librispeech``; :func:`recipe_names` has all.
        corpus_dir: the corpus as it was downloaded.
        options: further arguments of the recipe.

    Raises:
        ValueError: unknown recipe, one without transcripts, or arguments that it does not take.
    """
    import lhotse.recipes

    if name not in recipe_names():
        raise ValueError(f"Lhotse has no recipe {name!r}; it has {', '.join(recipe_names())}")
    if not Path(corpus_dir).is_dir():
        raise ValueError(f"{corpus_dir} is not a folder: give the corpus as it was downloaded")
    try:
        with Reading(FILES, f"the corpus {corpus_dir}"):
            made = getattr(lhotse.recipes, f"prepare_{name}")(corpus_dir, **options)
    except ForbiddenSourceError:
        raise
    except Exception as error:  # each recipe has its own kinds for a folder that is not its corpus
        raise ValueError(f"Lhotse's recipe {name} refuses: {type(error).__name__}: {error}") from error
    parts = dict(_parts(made))
    if not parts:
        raise ValueError(f"Lhotse's recipe {name} gives no recordings with transcripts: it is not for this")
    return {part: _utterances(manifests) for part, manifests in parts.items()}


def _parts(made: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the manifests of each part; recipes nest them by language, microphone and split."""
    if isinstance(made, Mapping):
        if isinstance(made.get("recordings"), RecordingSet) and isinstance(made.get("supervisions"), SupervisionSet):
            yield name or "all", made
        else:
            for key, value in made.items():
                yield from _parts(value, f"{name}_{key}" if name else str(key))


def _utterances(manifests: Mapping[str, Any]) -> CutSet:
    cuts = CutSet.from_manifests(recordings=manifests["recordings"], supervisions=manifests["supervisions"])
    return in_order(cuts.trim_to_supervisions(keep_overlapping=False))


def in_order(cuts: CutSet) -> CutSet:
    """Sort cuts by the id of the utterance, which becomes that of the cut: recipes read folders in any order."""
    named = (cut.with_id(cut.supervisions[0].id) for cut in cuts)
    return CutSet.from_cuts(sorted(named, key=lambda cut: cut.id))


def cuts_of_manifests(
    paths: Sequence[str | Path], text_field: str = "text", lang_field: str = "lang", policy: SourcePolicy = FILES
) -> CutSet:
    """Return the entries of NeMo manifests (JSON lines), with absolute paths and without audio.

    They are named after their files, as transcripts and word times elsewhere name them; parts of a longer file by
    their offset too, and files of one name by their folders. Text, language, speaker and gender go where Lhotse keeps
    them, all other keys into the custom field of the cut. Files of several channels keep them: whoever loads such a
    cut averages them.

    Args:
        paths: of the manifests.
        text_field: the key of the transcript.
        lang_field: the key of the language.
        policy: what audio may be read from.

    Raises:
        ValueError: if one can't be read, or lists the same audio twice.
    """
    from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator

    cuts: dict[str, DataCut] = {}
    places: set[tuple] = set()
    for path in paths:
        check_manifest(path, "", "nemo")
        fields = {"text_field": text_field, "lang_field": lang_field}
        lines = EntryFilter(remedy="leave the line out", text_keys=(*fields.values(),), kinds={str(path): "nemo"})
        try:
            reader = LazyNeMoIterator(str(path), **fields, metadata_only=False, shard_seed=0)
            entries = list(GatedCuts(reader, policy, lines))
        except (BadEntryError, ForbiddenSourceError):  # it names its line
            raise
        except Exception as error:  # NeMo's reader has its own kinds for a file that is not what it is said to be
            raise ValueError(
                f"{path} can't be read as a NeMo manifest: {type(error).__name__}: {in_one_line(error)}"
            ) from error
        for cut in map(partial(_with_fields, **fields), entries):
            for source in cut.recording.sources:
                if source.type == "file":
                    source.source = os.path.abspath(source.source)
            cut = _whole_piece(cut)
            place = cut.recording.sources[0].source, cut.start, cut.duration
            if place in places:
                raise ValueError(f"{place[0]} at {cut.start} s is in the manifests twice: leave one of them out")
            places.add(place)
            named = _named(cut, cuts)
            cuts[named.id] = named
    return CutSet.from_cuts(cuts.values())


def _whole_piece(cut: DataCut) -> DataCut:
    """Return the cut of a piece of a file with the true length of the file.

    Raises:
        ValueError: if the file ends before the piece does; names it.
    """
    restored, source = restore_piece(cut), cut.recording.sources[0]
    if restored is not cut and source.type == "file":
        file = Recording.from_file(source.source, recording_id=cut.recording.id).to_cut()
        own = [fastcopy(segment, channel=file.channel) for segment in restored.supervisions]
        cut = fastcopy(
            file, id=cut.id, start=cut.start, duration=restored.duration, custom=cut.custom, supervisions=own
        )
    promised, left = promised_seconds(cut), cut.recording.duration - cut.start
    if promised is not None and promised > left + EDGE:
        raise ValueError(
            f"{source.source} ends {left:.2f} s after the offset {cut.start} s, but its entry promises {promised:.2f} "
            "s: correct offset and duration, or leave the entry out"
        )
    return fastcopy(cut, duration=min(cut.duration, left))


def _with_fields(cut: DataCut, text_field: str, lang_field: str) -> DataCut:
    """Return the cut of NeMo's reader, which knows text and language, with all other keys of its manifest entry."""
    rest = {key: value for key, value in (cut.custom or {}).items() if key not in (text_field, lang_field)}
    about = {key: str(rest.pop(key)) for key in ("speaker", "gender") if isinstance(rest.get(key), (str, int))}
    return fastcopy(cut, custom=rest or None, supervisions=[fastcopy(s, **about) for s in cut.supervisions])


def _named(cut: DataCut, taken: Mapping[str, Any]) -> DataCut:
    """Return the cut under a name of its own."""
    path = Path(str(cut.recording.sources[0].source))
    part = "" if cut.start == 0 and cut.duration >= cut.recording.duration - 0.01 else f"_{cut.start:.3f}"
    folders = ["", *("-".join(path.parts[-number - 1 : -1]) + "-" for number in range(1, len(path.parts)))]
    names = (f"{folder}{path.stem}{part}" for folder in folders)
    name = next((name for name in names if name not in taken), f"{path}{part}-{cut.duration:.3f}")
    recording = fastcopy(cut.recording, id=name.removesuffix(part) if part else name)
    own = [fastcopy(segment, id=name, recording_id=recording.id) for segment in cut.supervisions]
    return fastcopy(cut, id=name, recording=recording, supervisions=own)
