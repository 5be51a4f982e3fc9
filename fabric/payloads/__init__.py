"""Values and their bytes: what can be published, how it lies on the wire, in shared memory and on disk.

`plan` a value, `write` the plan into memory, `decode` it elsewhere. `schema.py` describes the blobs and checks received
ones, `trees.py` describes and makes those of containers, `plans.py` the others, `tensors.py` is all that knows torch,
`decoders.py` reads blobs, `receiving.py` copies values out of them, `lending.py` lets a value be written in place,
`pool.py` keeps warm memory, `staging.py` waits for devices, `summing.py` copies with a checksum, `metadata.py` packs
the facts beside a value.
"""

from fabric.payloads.decoders import decode
from fabric.payloads.lending import Form, is_referred_to, lend, plan_loan, plan_snapshot, take_back
from fabric.payloads.metadata import METADATA_BYTES_MAX, pack_metadata, unpack_metadata
from fabric.payloads.plans import BufferPlan, Plan, plan
from fabric.payloads.pool import BufferPool, PooledBuffer
from fabric.payloads.receiving import decode_into, own
from fabric.payloads.schema import ARRAY, BYTES, FLOAT, INTEGER, TENSOR, TEXT, TREE
from fabric.payloads.staging import DeviceQueue, Pending, StagingError, stage
from fabric.payloads.summing import Digest, copy_summed, sampled_sum
from fabric.payloads.trees import register

__all__ = [
    "ARRAY",
    "BYTES",
    "FLOAT",
    "INTEGER",
    "METADATA_BYTES_MAX",
    "TENSOR",
    "TEXT",
    "TREE",
    "BufferPlan",
    "BufferPool",
    "DeviceQueue",
    "Digest",
    "Form",
    "Pending",
    "Plan",
    "PooledBuffer",
    "StagingError",
    "copy_summed",
    "decode",
    "decode_into",
    "is_referred_to",
    "lend",
    "own",
    "pack_metadata",
    "plan",
    "plan_loan",
    "plan_snapshot",
    "register",
    "sampled_sum",
    "stage",
    "take_back",
    "unpack_metadata",
]
