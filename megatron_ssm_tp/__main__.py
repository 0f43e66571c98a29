"""python -m megatron_ssm_tp generate | plan | doctor"""

import sys

from .cli import doctor, generate, plan
from .cli.console import Parser, guarded


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m megatron_ssm_tp", description="State-space models with tensor parallelism.")
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for command in (generate, plan, doctor):
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    return guarded(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
