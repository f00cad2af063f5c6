"""The weights of an ONNX file, and which node reads them. Nothing of the graph is run.

Only the fields that weights need are declared (https://onnx.ai/onnx/repo-docs/IR.html); protobuf
skips the others. Weights have to be float32 and stored inside the file.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

FLOAT = 1  # TensorProto.DataType
FIELDS = {  # message -> field: (number in the file, type, whether it is repeated)
    "Tensor": {
        "dims": (1, "INT64", True),
        "data_type": (2, "INT32", False),
        "name": (8, "STRING", False),
        "raw_data": (9, "BYTES", False),
    },
    "Node": {
        "input": (1, "STRING", True),
        "output": (2, "STRING", True),
        "op_type": (4, "STRING", False),
    },
    "Graph": {"node": (1, "Node", True), "initializer": (5, "Tensor", True)},
    "Model": {"graph": (7, "Graph", False)},
}


class Node(NamedTuple):
    """One operation of a graph."""

    kind: str  # "MatMul", "Add", ...
    inputs: tuple[str, ...]  # names of weights and of outputs of other nodes
    outputs: tuple[str, ...]


class Weights(NamedTuple):
    """What `read` returns."""

    arrays: dict[str, np.ndarray]  # float32, as stored
    nodes: tuple[Node, ...]  # in the order of the file


@functools.cache
def _model() -> Any:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="weights.proto", package="weights")
    for name, fields in FIELDS.items():
        declared = file.message_type.add(name=name)
        for field, (number, kind, repeated) in fields.items():
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            added = declared.field.add(name=field, number=number, label=label)
            if kind in FIELDS:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".weights.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("weights.Model"))


def read(path: str | Path) -> Weights:
    """Reads the weights of a file.

    Raises:
      ValueError: no ONNX file, or a weight that is not float32 or whose size is not its shape's.
    """
    try:
        graph = _model().FromString(Path(path).read_bytes()).graph
    except message.DecodeError as error:
        raise ValueError(f"{path}: got no ONNX file ({error}), expected one") from None
    arrays = {}
    for t in graph.initializer:
        shape = tuple(t.dims)
        size = 4 * int(np.prod(shape))
        if t.data_type != FLOAT or len(t.raw_data) != size:
            raise ValueError(f"{path}: {t.name}: got {len(t.raw_data)} bytes of type {t.data_type},"
                             f" expected {size} bytes of type {FLOAT} (float32)")  # fmt: skip
        arrays[t.name] = np.frombuffer(t.raw_data, np.float32).reshape(shape)
    nodes = tuple(Node(n.op_type, tuple(n.input), tuple(n.output)) for n in graph.node)
    return Weights(arrays, nodes)


def named_kernels(weights: Weights) -> dict[str, np.ndarray]:
    """All arrays by name; a nameless kernel is called by the bias that is added to its product.

    ``onnx::MatMul_470`` before the addition of ``...query.bias`` is ``...query.weight``, turned
    to [out, in], the layout of checkpoints.

    Raises:
      ValueError: a kernel whose product no bias is added to.
    """
    readers: dict[str, list[Node]] = {}
    for node in weights.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    out = {k: v for k, v in weights.arrays.items() if not k.startswith("onnx::")}
    for node in weights.nodes:
        kernels = [i for i in node.inputs if i.startswith("onnx::") and i in weights.arrays]
        if node.kind != "MatMul" or not kernels:
            continue
        added = [i for n in readers.get(node.outputs[0], []) if n.kind == "Add" for i in n.inputs]
        biases = [i for i in added if i.endswith(".bias")]
        if len(biases) != 1:
            raise ValueError(f"{kernels[0]}: got biases {biases} after it, expected one")
        out[f"{biases[0].removesuffix('.bias')}.weight"] = weights.arrays[kernels[0]].T
    return out
