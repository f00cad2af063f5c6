"""`python -m pydoc jlora` is a tour: every public name is in it, and says what it is."""

import inspect
import pydoc
import re

import jlora as jl


def test_pydoc_shows_every_public_name_with_its_text():
    page = pydoc.render_doc(jl, renderer=pydoc.plaintext)
    for name in jl.__all__:
        value = getattr(jl, name)
        assert len(inspect.getdoc(value) or "") > 20, name
        if inspect.isclass(value):
            assert f"class {name}(" in page, name
        elif inspect.isfunction(value):
            assert re.search(rf"^ +{name}\(", page, re.M), name


def test_the_tour_names_things_that_exist():
    for name in re.findall(r"jl\.(\w+)", jl.__doc__):
        assert hasattr(jl, name), name
