"""`python -m swirl NAME …` and `swirl NAME …`: the commands by name, or the list of them."""

from __future__ import annotations

import sys
from importlib import import_module

from swirl import __version__

COMMANDS = {
    "train": "the whole way: evaluate, generate, filter, train, evaluate",
    "generate": "questions -> trajectories.jsonl",
    "filter": "trajectories.jsonl -> kept.jsonl and dropped.jsonl",
    "evaluate": "how good is a policy on a task",
    "report": "runs' folders -> one page: what training changed, curves, every trajectory",
    "export": "a run's checkpoint -> a Hugging Face folder, at any time",
    "plan": "a model and flags of train -> memory and time, before anything is loaded",
    "serve": "a checkpoint to others, by OpenAI's protocol",
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: swirl COMMAND [FLAGS]; swirl COMMAND --help tells its flags", "", *lines])


def main() -> None:
    """Run one command. Exit code 2 on a name that is none, as on any wrong usage."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name == "--version":
        print(f"swirl {__version__}")
    elif name in ("", "-h", "--help"):
        print(_usage())
    elif name in COMMANDS:
        sys.argv = [f"swirl {name}", *sys.argv[2:]]
        import_module(f"swirl.{name}").run_command()
    else:
        print(f"error: swirl has no command '{name}': expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
