"""A training step of a public EsViT or CMD checkout, as its own loop takes it.

Started by benchmarks.step in a process of its own: python reference_step.py PATH SETTINGS.
The checkout's loop, networks, loss and optimizer run as they are; what its files lack on this
machine is put beside them, not into them:
- where there is no GPU, .cuda() and torch.cuda.synchronize() do nothing;
- names that newer versions of torch and timm no longer have;
- `model`, a name that its loop reads but never sets when it clips in float32;
- the CMD checkout's loss is NaN under today's kl_div, which stops its loop: the loss is taken
  as 0 there, with the same gradient graph, so that the step's work is done.
"""

import argparse
import collections.abc
import json
import math
import os
import sys
import tempfile
import types

import timm.data.transforms
import torch
import turns
from torch import nn


def prepare(path: str) -> None:
    """Let the checkout in `path` be imported here."""
    sys.path[:] = [path] + [p for p in sys.path if os.path.realpath(p or ".") != str(turns.ROOT)]
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
    for name in ("_pil_interp", "RandomResizedCropAndInterpolation", "ToNumpy", "ToTensor"):
        if not hasattr(timm.data.transforms, name):
            setattr(timm.data.transforms, name, None)
    sys.modules["torch._six"] = types.SimpleNamespace(
        container_abcs=collections.abc, string_classes=str, inf=math.inf
    )
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *args, **kwargs: self
        nn.Module.cuda = lambda self, *args, **kwargs: self
        torch.cuda.synchronize = lambda *args: None


def networks(main: types.ModuleType, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Student and teacher, with heads, as the checkout's own set-up makes them."""
    pair = []
    for is_teacher in (False, True):
        if "swin" in args.arch:
            backbone = main.build_model(
                main.config, is_teacher=is_teacher, use_dense_prediction=args.use_dense_prediction
            )
            width = backbone.num_features
        else:
            rate = {} if is_teacher else {"drop_path_rate": 0.1}
            backbone = main.vits.__dict__[args.arch](
                patch_size=args.patch_size, use_dense_prediction=args.use_dense_prediction, **rate
            )
            width = backbone.embed_dim
        backbone.head = main.DINOHead(width, args.out_dim)
        if args.use_dense_prediction:
            backbone.head_dense = main.DINOHead(width, args.out_dim)
        pair.append(backbone.cuda())
    student, teacher = pair
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher


def main() -> None:
    answers = turns.take_stdout()
    path, settings = sys.argv[1], json.loads(sys.argv[2])
    prepare(path)
    torch.set_num_threads(settings["threads"])
    import main_esvit as reference

    words = [
        "--arch", settings["arch"],
        "--out_dim", str(settings["prototypes"]),
        "--use_dense_prediction", str(settings["objective"] != "dino"),
        "--use_fp16", str(settings["device"] == "cuda"),
        "--freeze_last_layer", "0",
        "--local_crops_number", str(settings["local_crops"]),
        "--batch_size_per_gpu", str(settings["batch"]),
        "--cfg", f"{path}/experiments/imagenet/swin/{settings['arch']}_patch4_window7_224.yaml",
    ]  # fmt: skip
    args = argparse.ArgumentParser(parents=[reference.get_args_parser()]).parse_args(words)
    args.rank, args.output_dir = 0, tempfile.gettempdir()
    if "swin" in args.arch:
        reference.update_config(reference.config, args)
    on_gpu = settings["device"] == "cuda"
    with tempfile.NamedTemporaryFile() as store:
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo", init_method=f"file://{store.name}.d", rank=0, world_size=1
        )
    torch.manual_seed(0)
    student, teacher = networks(reference, args)
    reference.model = student
    # The end of an epoch, which is no part of a step.
    reference.utils.MetricLogger.synchronize_between_processes = lambda self: None
    student = nn.parallel.DistributedDataParallel(student, device_ids=[0] if on_gpu else None)
    loss_class = reference.DDINOLoss if args.use_dense_prediction else reference.DINOLoss
    loss = loss_class(args.out_dim, 2 + settings["local_crops"], 0.04, 0.04, 0, 1).cuda()
    loss.register_forward_hook(lambda _module, _inputs, value: torch.nan_to_num(value))
    optimizer = torch.optim.AdamW(reference.utils.get_params_groups(student))
    scaler = torch.amp.GradScaler("cuda") if args.use_fp16 else None

    sizes = [settings["global_size"]] * 2 + [settings["local_size"]] * settings["local_crops"]
    crops = [torch.randn(settings["batch"], 3, size, size) for size in sizes]

    def step() -> None:
        reference.train_one_epoch(
            student, teacher, teacher, loss, [(crops, None)], optimizer,
            [1e-4], [0.04], [0.996], 0, None, scaler, args,
        )  # fmt: skip

    turns.serve(step, settings["device"], answers)


if __name__ == "__main__":
    main()
