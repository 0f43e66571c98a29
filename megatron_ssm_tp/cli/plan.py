"""`plan`: how a checkpoint would be cut. Reads headers only, starts nothing."""

import argparse

from .console import say


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("plan", help="which rows and columns go to which rank, bytes, legal TP sizes")
    parser.set_defaults(run=run)
    parser.add_argument(
        "--load", required=True, metavar="DIR", help="checkpoint directory, Hugging Face or state-spaces"
    )
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N")


def run(args: argparse.Namespace) -> None:
    from ..checkpoint.loader import open_model
    from ..partition.explain import explain
    from ..partition.layout import check_tp_size

    model = open_model(args.load)
    check_tp_size(model.config, args.tensor_model_parallel_size)
    for line in explain(model.config, args.tensor_model_parallel_size, lambda name: model.sources[name].stored.names):
        say(line)
