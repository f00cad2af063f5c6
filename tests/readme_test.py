"""The README's quick start runs as it stands."""

import contextlib
import io
import re
from pathlib import Path

import jax

README = Path(__file__).parents[1] / "README.md"


def test_the_quick_start_runs():
    text = README.read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- quick start -->\n```python\n(.*?)```", text, re.S)
    out, scope = io.StringIO(), {}
    with contextlib.redirect_stdout(out), jax.numpy_dtype_promotion("standard"):
        exec(code, scope)
    assert "up/kernel" in out.getvalue()
    before = scope["loss"](scope["adapter"].trainable)
    assert scope["loss"](scope["trainable"]) < before
    assert scope["served"]["down"] is scope["params"]["down"] or (
        scope["served"]["down"]["kernel"] is scope["params"]["down"]["kernel"]
    )


def test_the_results_are_those_of_the_kept_report():
    from experiments.report import markdown, schema

    text = README.read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- results -->\n(.*?)<!-- /results -->", text, re.S)
    report = schema.read(README.parent / "docs" / "results" / "text_full" / "report.json")
    assert shown == markdown.render(report)


def test_the_example_of_the_guide_to_the_core_prints_what_it_says():
    text = (README.parent / "docs" / "core.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", text, re.S)
    (shown,) = re.findall(r"prints the two sites,\n\n```\n(.*?)```", text, re.S)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    table, program = out.getvalue().split("{ lambda", 1)
    assert table == shown
    assert "scan[" in program and "f32[3,8,8]" not in program.split("scan[")[1]


def test_programs_that_are_called_come_with_the_extra_that_is_named():
    """`pip install -e '.[experiments]'`, then programs of other packages in the same file."""
    setup = (README.parent / "setup.py").read_text(encoding="utf-8")
    (extra,) = re.findall(r"^EXPERIMENTS = \[(.*?)^\]", setup, re.S | re.M)
    text = README.read_text(encoding="utf-8")
    called = {word for word in ("tensorboard", "nbclient") if f"`{word} --" in text}
    assert called == {"tensorboard"}
    for name in called:
        assert re.search(rf'"{name}[><=]', extra), f"README calls {name}, which no extra brings"
