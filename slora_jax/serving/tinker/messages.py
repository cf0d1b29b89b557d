"""Tinker's protobuf messages, as the `tinker` client 0.38 sends and reads them.

The descriptors are built here, in a pool of their own, so that no file is generated. A map is written as its repeated
entries and an enum as an integer, which is the same on the wire.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

PROTOBUF = "application/x-protobuf"

STOP, LENGTH = 0, 1
"""Values of `stop_reason`."""
FLOAT32, INT64 = 1, 2
"""Values of `dtype`."""

_FIELDS = {
    "ForwardBackwardRequest": "string model_id=1, int32 seq_id=2, *Datum data=3, string loss_fn=4, "
    "*Number loss_fn_config=5, bool forward_only=6, *Setting loss_fn_config_v2=7",
    "Number": "string key=1, double value=2",
    "Setting": "string key=1, SettingValue value=2",
    "SettingValue": "double number=1, string text=2",
    "Datum": "*Chunk model_input=1, *NamedTensor loss_fn_inputs=2, *Span model_input_spans=3, "
    "*Span loss_fn_input_spans=4",
    "Chunk": "Text encoded_text=1, Other image=2, Other dmel=3",
    "Text": "bytes tokens=1",
    "Other": "",
    "Span": "",
    "NamedTensor": "string key=1, Tensor value=2",
    "Tensor": "bytes dense=1, Other sparse_csr=2, int32 dtype=3, *int64 shape=4",
    "ForwardBackwardOutput": "string loss_fn_output_type=1, *Record loss_fn_outputs=2, *Number metrics=3",
    "Record": "string type_tag=1, *NamedBatch fields=2, int64 num_datums=3",
    "NamedBatch": "string key=1, Batch value=2",
    "Batch": "bytes data=1, bytes offsets=2, int32 dtype=3, *int64 trailing_shape=4",
    "SampleResponse": "*Sequence sequences=1, bytes prompt_logprobs=2, Topk topk_prompt_logprobs=3, "
    "int32 prompt_cache_hit_tokens=4",
    "Sequence": "int32 stop_reason=1, bytes tokens=2, bytes logprobs=3, Topk topk_sampled_logprobs=4",
    "Topk": "bytes token_ids=1, bytes logprobs=2, uint32 k=3, uint32 length=4",
}
"""Message -> its fields as `type name=number`; `*` marks a repeated field."""


def _message_classes() -> dict[str, type[Message]]:
    file = FileDescriptorProto(name="slora_jax/tinker.proto", package="tinker", syntax="proto3")
    for message, fields in _FIELDS.items():
        descriptor = file.message_type.add(name=message)
        for field in filter(None, fields.split(", ")):
            kind, name, number = field.replace("=", " ").split()
            is_repeated, kind = kind.startswith("*"), kind.removeprefix("*")
            label = FieldDescriptorProto.LABEL_REPEATED if is_repeated else FieldDescriptorProto.LABEL_OPTIONAL
            added = descriptor.field.add(name=name, number=int(number), label=label)
            if kind in _FIELDS:
                added.type, added.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".tinker.{kind}"
            else:
                added.type = FieldDescriptorProto.Type.Value(f"TYPE_{kind.upper()}")
    pool = DescriptorPool()
    pool.Add(file)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"tinker.{name}")) for name in _FIELDS}


_CLASSES = _message_classes()
ForwardBackwardRequest: Any = _CLASSES["ForwardBackwardRequest"]
ForwardBackwardOutput: Any = _CLASSES["ForwardBackwardOutput"]
SampleResponse: Any = _CLASSES["SampleResponse"]
