"""Measure how accurate a path is, and compare it with another one."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import time
from pathlib import Path
from typing import Any

from vllm_mxfp4_gfx950.evaluation import report
from vllm_mxfp4_gfx950.evaluation.compare import LEVEL, Difference, Position, divergence, paired
from vllm_mxfp4_gfx950.evaluation.measure import Question, Tasks, ask, choose_endpoint, read
from vllm_mxfp4_gfx950.evaluation.side import RESULT, Side, digest, identity, parse, serving
from vllm_mxfp4_gfx950.moe import Mxfp4Error

ROLES = ("tested", "baseline")
REQUIRED = ("lm_eval", "scipy", "matplotlib", "tqdm", "requests")

EPILOG = """\
A side is one of:
  "[NAME=VALUE ...] MODEL [arguments of vllm serve ...]"   a server that is started and stopped here
  "http://host:port [LOG]"                                 one that runs, with the file of its log
  DIRECTORY                                                what an earlier run kept of a side
"""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found of one side.

    Args:
        side: as the user wrote it.
        path: what computed the experts; empty where nothing says so.
        endpoint: that the questions were put to; empty without questions.
        when: it was measured.
        questions: of lm-eval, with their outcomes.
        positions: of the text, with what was expected there.
    """

    side: str
    path: str
    endpoint: str
    when: str
    questions: list[Question]
    positions: list[Position]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "sides", nargs="+", metavar="side", help="the tested one, and what it is held against"
    )
    parser.add_argument("--tasks", nargs="+", help="of lm-eval; by default gsm8k, or all of --include-path")
    parser.add_argument("--include-path", type=Path, help="folder with task files to take the tasks from")
    parser.add_argument("--limit", type=int, help="questions of each task; by default all")
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time")
    parser.add_argument("--endpoint", choices=("chat", "completions"), help="by default what the model needs")
    parser.add_argument("--margin", type=float, default=0.02, help="loss of accuracy that is allowed")
    parser.add_argument("--logprobs", type=Path, metavar="TEXT", help="compare distributions over this file")
    parser.add_argument("--top", type=int, default=20, help="tokens of each distribution, -1 for all")
    parser.add_argument("--window", type=int, default=512, help="tokens that are read at once")
    parser.add_argument("--max-kl", type=float, default=0.01, help="mean KL that is allowed, in nats")
    parser.add_argument("--same-path", action="store_true", help="compare even where both may be one path")
    parser.add_argument(
        "--out", type=Path, default=Path("mxfp4-eval"), help="directory of results and report"
    )


def run(args: argparse.Namespace) -> int:
    """Measure each side, write the report; the exit code is 1 when the tested side is worse than allowed."""
    check(args)
    sides = [parse(text) for text in args.sides]
    tasks = None
    if (args.tasks or args.include_path or not args.logprobs) and not all(side.kept for side in sides):
        tasks = Tasks(args.tasks or ([] if args.include_path else ["gsm8k"]), args.include_path)
    settings = {
        "questions": [tasks.identity(), args.limit, args.concurrency, args.endpoint] if tasks else None,
        "text": [args.logprobs.read_text(), args.top, args.window] if args.logprobs else None,
    }
    directories = [side.kept or args.out / directory_name(side, settings) for side in sides]
    by_index: dict[int, Measured] = {}
    # What is kept comes first: its path is known before a server is started.
    for index in sorted(range(len(sides)), key=lambda index: not (directories[index] / RESULT).is_file()):
        others = [found.path for found in by_index.values()]
        by_index[index] = measure(sides[index], directories[index], tasks, args, others)
    measured = [by_index[index] for index in range(len(sides))]
    args.out.mkdir(parents=True, exist_ok=True)
    lines = list(map(heading, ROLES, measured))
    worse = False
    if len(measured) == 2:
        compared, worse = conclude(measured[0], measured[1], args)
        lines += compared
    else:
        lines += alone(measured[0])
    (args.out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwritten: {args.out / 'report.md'}")
    return 1 if worse else 0


def check(args: argparse.Namespace) -> None:
    """Raise Mxfp4Error for what cannot be done."""
    if len(args.sides) > 2:
        raise Mxfp4Error("the sides", "one or two", len(args.sides), "Quote each side as one argument")
    for name, least in (("limit", 1), ("concurrency", 1), ("window", 2), ("margin", 0), ("max_kl", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise Mxfp4Error(f"--{name.replace('_', '-')}", f"at least {least}", value, "Correct it")
    if args.top < 1 and args.top != -1:
        raise Mxfp4Error("--top", "at least 1, or -1 for all", args.top, "Correct it")
    for option, path in (("--logprobs", args.logprobs), ("--include-path", args.include_path)):
        if path and not path.exists():
            raise Mxfp4Error(option, "a path that exists", path, "Correct it")
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        fix = "Install this package's extra 'eval', where need be in another environment than vLLM's"
        raise Mxfp4Error("the environment", "able to import lm-eval", f"no {', '.join(missing)}", fix)


def directory_name(side: Side, settings: dict[str, Any]) -> str:
    """The same for all that would answer the same: a result that is found there still holds."""
    key = digest(json.dumps([identity(side), settings], sort_keys=True).encode())[:12]
    return re.sub(r"[^\w.-]+", "-", Path(side.url or side.command[0]).name) + f"-{key}"


def measure(
    side: Side, directory: Path, tasks: Tasks | None, args: argparse.Namespace, other_paths: list[str]
) -> Measured:
    """One side's answers: those that `directory` has, or new ones, which it then has.

    Args:
        side: to be measured.
        directory: for its result, the answers that came so far, and its log.
        tasks: of lm-eval; None for none.
        args: the command line.
        other_paths: of the sides that were measured before.
    """
    if (directory / RESULT).is_file():
        kept = load(directory)
        print(f"kept from {kept.when}: {directory}", flush=True)
        check_paths(args, other_paths, kept.path)
        return kept
    directory.mkdir(parents=True, exist_ok=True)
    more = ["--max-logprobs", str(args.top)] if args.logprobs else []
    with serving(side, directory, more) as server:
        check_paths(args, other_paths, server.path)
        endpoint, questions = "", []
        if tasks:
            endpoint = choose_endpoint(args.endpoint, server, tasks)
            questions = ask(server, endpoint, tasks, args.limit, args.concurrency, directory / "answers")
        positions = read(server, args.logprobs.read_text(), args.top, args.window) if args.logprobs else []
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    result = Measured(side.text, server.path, endpoint, when, questions, positions)
    (directory / RESULT).write_text(json.dumps(dataclasses.asdict(result)))
    return result


def load(directory: Path) -> Measured:
    """What `measure` wrote."""
    content = json.loads((directory / RESULT).read_text())
    content["questions"] = [Question(**question) for question in content["questions"]]
    content["positions"] = [
        Position(**position | {"top": {int(token): value for token, value in position["top"].items()}})
        for position in content["positions"]
    ]
    return Measured(**content)


def check_paths(args: argparse.Namespace, others: list[str], path: str) -> None:
    """Raise Mxfp4Error where two sides are, or may be, served by one path, unless that was asked for."""
    for other in others:
        if not args.same_path and (not path or not other or path == other):
            found = " and ".join(repr(name or "not known") for name in (other, path))
            fix = "Correct a side, name a server's log behind its URL, or add --same-path if this is meant"
            raise Mxfp4Error("the MoE paths of the two sides", "different", found, fix)


def heading(role: str, found: Measured) -> str:
    """Which side this was, and what served it."""
    over = f" over {found.endpoint}" if found.endpoint else ""
    return f"- {role}: `{found.side}`, {found.when}{over}; MoE path: {found.path or 'not known'}"


def alone(found: Measured) -> list[str]:
    """The scores of a side with nothing to hold it against, with their intervals."""
    from scipy.stats import binomtest

    lines = ["", "| task | questions | accuracy | interval |", "|---|---|---|---|"]
    for task in dict.fromkeys(question.task for question in found.questions):
        right = [question.right for question in found.questions if question.task == task]
        low, high = binomtest(sum(right), len(right)).proportion_ci(1 - LEVEL, "wilson")
        lines.append(f"| {task} | {len(right)} | {sum(right) / len(right):.4f} | {low:.4f} to {high:.4f} |")
    if found.positions:
        surprise = -sum(position.logprob for position in found.positions) / len(found.positions)
        lines += ["", f"- {len(found.positions)} tokens surprised by {surprise:.4f} nats each"]
    return lines


def conclude(tested: Measured, baseline: Measured, args: argparse.Namespace) -> tuple[list[str], bool]:
    """Compare two sides, and write report.json and report.png.

    Returns:
        The report's lines, and whether the tested side is worse than it may be.

    Raises:
        Mxfp4Error: the two were not asked the same.
    """
    for what, asked in (
        ("questions", [[(q.task, q.asked) for q in side.questions] for side in (tested, baseline)]),
        ("tokens", [[p.token for p in side.positions] for side in (tested, baseline)]),
    ):
        if asked[0] != asked[1]:
            found = f"{len(asked[0])} and {len(asked[1])}, not equal"
            fix = "Measure both with the same options, and models with one tokenizer over one endpoint"
            raise Mxfp4Error(f"the {what} of the two sides", "the same", found, fix)
    pairs = list(zip(tested.questions, baseline.questions, strict=True))
    tasks = list(dict.fromkeys(question.task for question in tested.questions))
    differences: dict[str, Difference] = {}
    lines: list[str] = []
    for task in tasks:
        right = [(test.right, base.right) for test, base in pairs if test.task == task]
        differences[task] = paired(
            [test for test, _ in right], [base for _, base in right], LEVEL / len(tasks)
        )
    worse = any(found.verdict(args.margin) == "regression" for found in differences.values())
    if tasks:
        lines += ["", report.HEADER]
        lines += [report.accuracy_row(task, found, args.margin) for task, found in differences.items()]
        lines += ["", f"- intervals hold at {1 - LEVEL:.0%} for all tasks together; margin {args.margin:g}"]
        empty = [sum(question.empty for question in side.questions) for side in (tested, baseline)]
        lines.append(f"- empty answers, counted as wrong: tested {empty[0]}, baseline {empty[1]}")
    facts: dict[str, Any] = {"tested": tested.side, "baseline": baseline.side}
    facts |= {"paths": [tested.path, baseline.path], "margin": args.margin, "max_kl": args.max_kl}
    facts["tasks"] = {
        task: dataclasses.asdict(found) | {"verdict": found.verdict(args.margin)}
        for task, found in differences.items()
    }
    facts["changed"] = [
        {"task": test.task, "question": test.asked, "tested": test.answer, "baseline": base.answer}
        | {"right": "tested" if test.right else "baseline"}
        for test, base in pairs
        if test.right != base.right
    ]
    kls: list[float] = []
    if tested.positions:
        apart, kls = divergence(tested.positions, baseline.positions)
        worse |= not apart.mean_kl <= args.max_kl  # NaN is worse, too.
        facts["logprobs"] = dataclasses.asdict(apart)
        lines += ["", *report.divergence_lines(apart, tested.positions, baseline.positions, args.max_kl)]
    facts["worse"] = worse
    (args.out / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
    report.plot(args.out / "report.png", differences, args.margin, kls, args.max_kl)
    return [*lines, "", "![differences](report.png)"], worse
