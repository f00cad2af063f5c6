"""Stage `report`: curves of all trained parts by name, and one table of methods for everyone."""

import numpy as np

from experiments.config import Config
from experiments.report import names, schema
from experiments.stages import report, user_tasks
from experiments.workdir import Folder, write_json


def test_curves_are_thinned_and_named_by_their_model(tmp_path):
    config = Config()
    codec, denoiser = (
        Folder(tmp_path, name, config.key(name)).open() for name in ("codec", "denoiser")
    )
    write_json(codec / "curves_generator.json", {})  # a PCA has none
    for name in ("pdiff_global", "pdiff_task"):
        write_json(codec / f"curves_{name}.json", {name: [3.0, 2.0, 1.0]})
        write_json(denoiser / f"curves_{name}.json", {"loss": np.arange(500.0).tolist()})
    found = {"diffusion": {"loss": [1.0], "diffusion": np.arange(1000.0).tolist(),
                           "dispersive": [0.0] * 1000}}  # fmt: skip
    write_json(denoiser / "curves_generator.json", found)
    curves = report.curves(tmp_path, config)
    steps, values = curves["generator diffusion/diffusion"]
    assert len(values) == 200 and steps[0] == 5 and values[0] == 2.0 and steps[-1] == 1000
    assert curves["codec pdiff_task"][1] == [3.0, 2.0, 1.0]
    assert not any("dispersive" in name for name in curves)  # all zero: it was not used


def test_every_list_of_methods_is_the_table():
    keys = [m.key for m in names.METHODS]
    assert len(set(keys)) == len(keys)
    for kind in (schema.SEEN_KEYS, schema.UNSEEN_KEYS, user_tasks.ORDER, names.gap_methods()):
        assert [k for k in keys if k in kind] == list(kind)  # a subset, in the table's order
    assert set(schema.SEEN_KEYS) | set(schema.UNSEEN_KEYS) == set(keys)
    assert set(schema.USER_KEYS) <= set(user_tasks.ORDER)
    assert not {"base", "trained"} & set(names.gap_methods())
    assert all(m.label and m.short and m.remark for m in names.METHODS)
    assert names.method("not there").label == "not there"
