"""The documentation: its code runs, its pages are built without a warning, systems have pages."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jlora import registry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    scope = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in blocks(page.read_text(encoding="utf-8"), "python"):
            exec(compile(code, str(page), "exec"), scope)


def test_every_command_of_the_pages_exists():
    from jlora.cli.main import COMMANDS

    for page in PAGES:
        for code in blocks(page.read_text(encoding="utf-8"), "bash"):
            for command in re.findall(r"^jlora (\w+)", code, re.M):
                assert command in COMMANDS, f"{page}: {command}"


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "system_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_system_has_a_page_with_its_equation_and_record(hook):
    pages = hook.pages(ROOT)
    assert len(pages) == len(registry.systems()) + 1
    for placed in registry.systems():
        text = pages[f"systems/{hook.slug(placed.system.name)}.md"]
        assert placed.system.paper in text and placed.module.replace(".", "/") in text
        assert ".. math::" not in text and ":math:" not in text
    assert "<math" in pages["systems/dora.md"]
    index = pages["systems/index.md"]
    assert all(r.row.name in index for r in registry.work_list(ROOT) if not r.systems)


def test_a_claim_is_shown_with_its_figures(hook, tmp_path):
    from experiments.claims import runner
    from tests.experiments.claims.runner_test import toy

    record = runner.measure(toy(), [0, 1, 2], tmp_path)
    runner.keep(record, tmp_path / registry.RECORDS)
    text = "\n".join(hook.claim("do_merging", tmp_path))
    assert "**reproduced**" in text and f"{record['difference']['mean']:+.4f}" in text
    assert hook.claim("lego", tmp_path) == []


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "systems" / "dora" / "index.html").is_file()
    assert "jlora.core.lift" in (tmp_path / "reference" / "core" / "index.html").read_text()
