r"""What L_T residual costs one process of many in a step: arithmetic, bytes, memory; all counted.

    python -m benchmarks.teacher_term --processes 64 --batch 64 --arch vit_small MODEL.PATCH_SIZE 8

Once with the candidates of CMD.LT_CANDIDATES, once with the images of all processes. The term is
run on fake tensors, which have shapes and no memory, in a group of processes that are not there;
beside it stand a step's other operations, counted by one image. Bytes are those that a process
receives when collectives go round a ring.
"""

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common
from benchmarks.own_step import drawn_batches, options, pretraining
from losses import inter
from utils.errors import run_script
from utils.views import Views

PASSES = {"allreduce_": 2, "allgather_": 1}  # how often what comes out goes round the ring


class Received(TorchDispatchMode):
    """Bytes that this process receives of the others in its block."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            made = sum(leaf.nbytes for leaf in tree_leaves(args[0]) if isinstance(leaf, Tensor))
            rounds = PASSES[func.overloadpacket.__name__]
            others = 1 - 1 / dist.get_world_size()
            self.bytes += math.ceil(rounds * made * others)
        return func(*args, **(kwargs or {}))


def of_a_step(settings: dict) -> tuple[int, torch.Size]:
    """Operations of a step without L_T for one image; the shape of its teacher's patches."""
    alone = {"batch": 1, "options": settings["options"] | {"CMD.LT": "none"}}
    run = pretraining(settings | alone)
    batches = drawn_batches(run)
    with FlopCounterMode(display=False) as counter:
        run.train_step(batches)
    _, teacher = run.forward(next(batches).data)
    return counter.get_total_flops(), teacher.patch_embeddings[0].shape


def of_the_term(shape: torch.Size, batch: int, k: int, candidates: int) -> dict[str, float]:
    """L_T's target for `batch` images of this process. shape: [2, N, d], patches of an image."""
    views, count, width = shape
    with FakeTensorMode():
        patches, memory, received = (
            torch.empty(views * batch, count, width),
            MemTracker(),
            Received(),
        )
        memory.track_external(patches)
        teacher = Views(batch, patches[:, 0], patch_embeddings=[patches])
        with memory, received, FlopCounterMode(display=False) as counter:
            drawn = inter.draw_candidates(teacher, candidates, seed=0)
            inter.diverse_targets(teacher, k, True, drawn)
        (peak,) = memory.get_tracker_snapshot("peak").values()
    return {
        "gflop": counter.get_total_flops() / 1e9,
        "received_mb": received.bytes / 1e6,
        "peak_memory_gib": (peak["Total"] - patches.nbytes) / 2**30,
    }


def main() -> None:
    parser = common.parser(__doc__)
    common.add_network_options(parser)
    parser.add_argument("--processes", type=common.positive, default=64, help="(%(default)s)")
    common.add_crop_options(parser, batch=64)
    args = parser.parse_args()
    began = time.perf_counter()
    settings = common.settings_of(args, "fp32") | {"device": "cpu"}
    cmd = options(settings).CMD
    flops, shape = of_a_step(settings)
    dist.init_process_group("fake", rank=0, world_size=args.processes, store=FakeStore())
    images = args.batch * args.processes
    figures = {"step without L_T": {"gflop": args.batch * flops / 1e9}}
    for candidates in (cmd.LT_CANDIDATES, images):
        found = of_the_term(shape, args.batch, cmd.DIVERSE_K, candidates)
        figures[f"L_T, {candidates} candidates"] = found
        print(
            f"{candidates} candidates, {shape[1]} patches: {found['gflop']:.0f} GFLOP, "
            f"{1e11 * found['gflop'] / args.batch / flops:.1f} % of the rest of a step; "
            f"{found['received_mb']:.0f} MB received; {found['peak_memory_gib']:.2f} GiB"
        )
    dist.destroy_process_group()
    report = {
        "what": f"L_T on one of {args.processes} processes, {common.network_in_words(args)}",
        "device": common.device_name("cpu", args.threads),
        "seconds": round(time.perf_counter() - began, 1),
        "figures": figures,
        "remarks": ["Counted, not timed; the memory is what the target takes beside the patches."],
    }
    common.write_report(args.output, "teacher_term", args.threads, report)


if __name__ == "__main__":
    run_script(main)
