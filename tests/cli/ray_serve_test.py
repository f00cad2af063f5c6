"""Arguments of the deployment; two replicas on this machine, where Ray is installed."""

import importlib.util
import json
import time
import urllib.request

import jax
import pytest

import jlora as jl
from jlora.cli import ray_serve
from jlora.models import decoder
from tests.experiments.finetuning.conftest import CONFIG, letters


def test_arguments_become_flags():
    got = ray_serve.flags({"base": "models/a b", "adapters": "x", "memory": 64})
    assert got == ["--base=models/a b", "--adapters=x", "--memory=64"]


@pytest.mark.parametrize(("args", "said"), [
    ({"base": "x"}, "adapters: missing; expected adapters=PATH"),
    ({"base": "x", "adapters": "y", "port": 1}, "port: got an unknown argument, expected one of"),
    ({"base": "x", "adapters": "y", "bases": 1}, "bases: got an unknown argument"),
])  # fmt: skip
def test_what_is_no_argument_is_refused(args, said):
    with pytest.raises(ValueError, match=said):
        ray_serve.flags(args)


@pytest.mark.parametrize("value", ["0", "two", None, -1])
def test_a_number_of_replicas_is_one(value):
    with pytest.raises(ValueError, match=r"replicas: got .* expected an integer of at least 1"):
        ray_serve._number("replicas", value)
    assert ray_serve._number("gpus", "0") == 0


needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not part of the test extra: 240 MB"
)


@needs_ray
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_replicas_share_a_folder_of_adapters(tmp_path):
    """An adapter that is put into the folder later is found by both."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]

    params = decoder.init(jax.random.key(0), CONFIG)
    decoder.save(tmp_path / "model", CONFIG, params)
    letters().save_pretrained(tmp_path / "model")
    (tmp_path / "adapters").mkdir()
    app = ray_serve.app({
        "base": str(tmp_path / "model"), "adapters": str(tmp_path / "adapters"), "memory": 8,
        "max_rank": 4, "rows": 2, "replicas": 2, "cpus": 0,
    })  # fmt: skip
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.run(app, name="jlora")
        url = "http://127.0.0.1:8000/v1/"
        model = lambda p, ids: decoder.forward(p, ids, config=CONFIG).logits  # noqa: E731
        ids = jax.numpy.zeros((1, 2), "int32")
        adapter = jl.init(jax.random.key(1), model, params, ids,
                          methods={"layers/attention/query/kernel": jl.LoRA(2)})  # fmt: skip
        adapter = adapter.replace(trainable=jax.tree.map(lambda t: t + 0.5, adapter.trainable))
        jl.io.save_peft(tmp_path / "adapters/late", adapter, jl.io.llama(), params=params)
        answers = []
        for _ in range(8):
            body = {"model": "late", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}
            request = urllib.request.Request(
                url + "completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                answers.append(json.load(answer)["choices"][0]["text"])
        assert len(set(answers)) == 1 and answers[0]
        replicas = serve.status().applications["jlora"].deployments["jlora"].replica_states
        assert replicas == {"RUNNING": 2}
    finally:
        serve.shutdown()
        ray.shutdown()
        time.sleep(0.1)
