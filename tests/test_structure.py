# SPDX-License-Identifier: Apache-2.0
"""The structure of the package: no circle of imports, neither between files nor between folders of any depth.

Imports inside functions and under ``TYPE_CHECKING`` count like all others.
"""

from collections import defaultdict
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

PACKAGE = "nemo_mtbi"


@pytest.fixture(scope="module")
def imports():
    """Modules that each module imports, packages (``__init__``) included."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def circle(graph):
    """Return a circle of a graph as a list of its nodes, or ``None``."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return None


def folder_graphs(imports):
    """For each folder, the imports between what lies directly in it, files and folders alike."""
    graphs = defaultdict(lambda: defaultdict(set))
    for module, targets in imports.items():
        for target in targets:
            ours, theirs = module.split("."), target.split(".")
            depth = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            if depth is not None:  # else one of them is a package that holds the other
                graphs[".".join(ours[:depth])][ours[depth]].add(theirs[depth])
    return graphs


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    graphs = folder_graphs({"p.a.x": {"p.b.y"}, "p.b.z": {"p.a.w"}})
    assert circle(graphs["p"]), "two folders that import each other, through different files"
    assert circle(folder_graphs({"p.a.x": {"p.b.y"}, "p.b.z": {"p.c"}})["p"]) is None


def test_files_import_in_no_circle(imports):
    assert circle(imports) is None
    assert len(imports) > 200


def test_folders_import_in_no_circle(imports):
    graphs = folder_graphs(imports)
    assert {"nemo_mtbi", "nemo_mtbi.parallel", "nemo_mtbi.llm"} <= set(graphs)
    assert {folder: found for folder, graph in graphs.items() if (found := circle(graph))} == {}
