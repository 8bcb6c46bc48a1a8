"""The notebooks: whole and without outputs; and run from the first cell to the last, with smaller parameters."""

import ast
import importlib
import json
import subprocess
import sys

import pytest
from training_runs import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def cells_of(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return notebook["cells"]


def code_of(path, parameters):
    """The program of a notebook whose parameters are set to these after they are set to its own."""
    parts = []
    for cell in cells_of(path):
        if cell["cell_type"] == "code":
            parts.append("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", ()):
                own = {node.id for node in ast.walk(ast.parse(parts[-1])) if isinstance(node, ast.Name)}
                assert parameters.keys() <= own
                parts += [f"{name} = {value!r}" for name, value in parameters.items()]
    return "\n".join(parts)


@each_notebook
def test_a_notebook_has_no_outputs_and_imports_what_is_there(path):
    cells = cells_of(path)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in code) == 1
    assert len({cell["id"] for cell in cells}) == len(cells)
    for node in ast.walk(ast.parse(code_of(path, {}))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("xdpo"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.slow
def test_the_notebooks_run_in_the_embedded_world(tmp_path):
    """The second one on the run of the first."""
    run = str(tmp_path / "run")
    embedded = {"models": {"base": "assets/tiny/pipeline", "mine": run}, "prompts": "tinyprompts"}
    embedded |= {"options": ["--limit", "4", "--steps", "2", "--guidance", "1"], "output": str(tmp_path / "evaluation")}
    said = []
    for name, parameters in (
        ("quickstart.ipynb", {"run": run, "steps": 2, "count": 2}),
        ("evaluate_my_model.ipynb", embedded | {"scorers": "tiny_reward,tiny_alignment"}),
    ):
        program = code_of(ROOT / "examples" / name, parameters)
        command = [sys.executable, "-c", program]
        ended = subprocess.run(command, cwd=ROOT / "examples", capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout[-3000:]
        said.append(ended.stdout)
    assert "tiny_alignment" in said[0] and said[0].count(" wins, ") == 2
    assert (tmp_path / "run" / "index.html").is_file()
    assert (tmp_path / "evaluation" / "results" / "report.html").is_file() and "win rate" in said[1]
