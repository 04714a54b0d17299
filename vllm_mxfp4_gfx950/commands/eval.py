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

from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.evaluation import report
from vllm_mxfp4_gfx950.evaluation.compare import LEVEL, Difference, Position, divergence, paired
from vllm_mxfp4_gfx950.evaluation.measure import Question, Tasks, ask, choose_endpoint, read
from vllm_mxfp4_gfx950.evaluation.server import Access, describe
from vllm_mxfp4_gfx950.evaluation.side import (
    LEVEL_VARIABLE,
    RESULT,
    Side,
    digest,
    identity,
    key_of,
    parse,
    serving,
)

ROLES = ("tested", "baseline")
REQUIRED = ("lm_eval", "scipy", "matplotlib", "tqdm", "requests")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was found of one side.

    Args:
        side: as the user wrote it.
        path: what computed the experts; empty where nothing says so.
        endpoint: that the questions were put to; empty without questions.
        when: it was measured.
        questions: of lm-eval, with their outcomes.
        top: tokens of each distribution; 0 without a text.
        positions: of the text, with what was expected there.
    """

    side: str
    path: str
    endpoint: str
    when: str
    questions: list[Question]
    top: int
    positions: list[Position]


def run(args: argparse.Namespace) -> int:
    """Measure each side, write the report; the exit code is 1 when the tested side is worse than allowed."""
    check(args)
    text = read_text(args.logprobs) if args.logprobs else ""
    sides = [parse(side) for side in args.sides]
    tasks = None
    if (args.tasks or args.include_path or not args.logprobs) and not all(side.kept for side in sides):
        tasks = Tasks(args.tasks or ([] if args.include_path else ["gsm8k"]), args.include_path)
    settings = {
        "questions": [tasks.identity(), args.limit, args.concurrency, args.endpoint] if tasks else None,
        "text": [text, args.top, args.window] if args.logprobs else None,
    }
    directories = [side.kept or args.out / directory_name(side, settings) for side in sides]
    if len({directory.resolve() for directory in directories}) < len(sides):
        fix = "Correct one, or measure it twice, with two --out, and compare the two directories"
        raise Mxfp4Error("the two sides", "different", f"twice the one of {directories[0]}", fix)
    paths: dict[int, str] = {}
    for index, side in enumerate(sides):
        if side.url and not (directories[index] / RESULT).is_file():
            path = describe(side.url, side.log, Access(key_of(side))).path
            check_paths(args, list(paths.values()), path)
            paths[index] = path
    by_index: dict[int, Measured] = {}
    # What is kept comes first: its path is known before a server is started.
    for index in sorted(range(len(sides)), key=lambda index: not (directories[index] / RESULT).is_file()):
        others = [path for other, path in paths.items() if other != index]
        by_index[index] = measure(sides[index], directories[index], tasks, text, args, others)
        paths[index] = by_index[index].path
    measured = [by_index[index] for index in range(len(sides))]
    args.out.mkdir(parents=True, exist_ok=True)
    if len(measured) == 2:
        found, worse = conclude(measured[0], measured[1], args)
    else:
        found, worse = alone(measured[0], args.out), False
    lines = [*map(heading, ROLES, measured), *found, "", "![figures](report.png)"]
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
    if args.include_path and not args.include_path.is_dir():
        raise Mxfp4Error("--include-path", "a directory that exists", args.include_path, "Correct it")
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        fix = "Install this package's extra 'eval', where need be in another environment than vLLM's"
        raise Mxfp4Error("the environment", "able to import lm-eval", f"no {', '.join(missing)}", fix)


def read_text(file: Path) -> str:
    """The text whose distributions are compared."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = f"{file} ({type(error).__name__})"
        raise Mxfp4Error("--logprobs", "a text file in UTF-8", found, "Correct it") from error


def directory_name(side: Side, settings: dict[str, Any]) -> str:
    """The same for all that would answer the same: a result that is found there still holds."""
    key = digest(json.dumps([identity(side), settings], sort_keys=True).encode())[:12]
    return re.sub(r"[^\w.-]+", "-", Path(side.url or side.command[0]).name) + f"-{key}"


def measure(
    side: Side,
    directory: Path,
    tasks: Tasks | None,
    text: str,
    args: argparse.Namespace,
    other_paths: list[str],
) -> Measured:
    """One side's answers: those that `directory` has, or new ones, which it then has.

    Args:
        side: to be measured.
        directory: for its result, the answers that came so far, and its log.
        tasks: of lm-eval; None for none.
        text: to be read, if the command line has --logprobs.
        args: the command line.
        other_paths: of the other side, where it is known by now.
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
        positions = read(server, text, args.top, args.window) if args.logprobs else []
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    top = args.top if args.logprobs else 0
    result = Measured(side.text, server.path, endpoint, when, questions, top, positions)
    part = directory / f"{RESULT}.part"
    part.write_text(json.dumps(dataclasses.asdict(result)))
    part.replace(directory / RESULT)  # An interrupted write leaves no result.
    return result


def load(directory: Path) -> Measured:
    """What `measure` wrote.

    Raises:
        Mxfp4Error: it is not that, or that of another version of this package.
    """
    try:
        content = json.loads((directory / RESULT).read_text())
        content["questions"] = [Question(**question) for question in content["questions"]]
        content["positions"] = [
            Position(**position | {"top": {int(token): value for token, value in position["top"].items()}})
            for position in content["positions"]
        ]
        return Measured(**content)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        rule = "a result that this version of `vllm-mxfp4 eval` wrote"
        raise Mxfp4Error(str(directory / RESULT), rule, found, "Measure the side anew") from error


def check_paths(args: argparse.Namespace, others: list[str], path: str) -> None:
    """Raise Mxfp4Error where two sides are, or may be, served by one path, unless that was asked for."""
    if len(args.sides) == 2 and not args.same_path and (not path or path in others):
        found = " and ".join(repr(name or "not known") for name in (*others, path))
        fix = (
            f"Correct a side; name a server's log, written with {LEVEL_VARIABLE}=INFO, behind its URL; "
            "or add --same-path if this is meant"
        )
        raise Mxfp4Error("the MoE paths of the two sides", "known and different", found, fix)


def heading(role: str, found: Measured) -> str:
    """Which side this was, and what served it."""
    over = f" over {found.endpoint}" if found.endpoint else ""
    return f"- {role}: `{found.side}`, {found.when}{over}; MoE path: {found.path or 'not known'}"


def alone(found: Measured, out: Path) -> list[str]:
    """The scores of a side with nothing to hold it against, with their intervals, for all tasks together.

    Args:
        found: of the side.
        out: gets report.json and report.png.

    Returns:
        The report's lines.
    """
    from scipy.stats import binomtest

    tasks = list(dict.fromkeys(question.task for question in found.questions))
    facts: dict[str, Any] = {"tested": found.side, "paths": [found.path], "tasks": {}}
    lines = ["", "| task | questions | accuracy | interval |", "|---|---|---|---|"] if tasks else []
    intervals: dict[str, tuple[float, float, float]] = {}
    for task in tasks:
        right = [question.right for question in found.questions if question.task == task]
        accuracy = sum(right) / len(right)
        low, high = binomtest(sum(right), len(right)).proportion_ci(1 - LEVEL / len(tasks), "wilson")
        facts["tasks"][task] = {"questions": len(right), "tested": sum(right), "low": low, "high": high}
        intervals[task] = (accuracy, low, high)
        lines.append(f"| {task} | {len(right)} | {accuracy:.4f} | {low:.4f} to {high:.4f} |")
    surprises = [-position.logprob for position in found.positions]
    if surprises:
        surprise = sum(surprises) / len(surprises)
        facts["logprobs"] = {"positions": len(surprises), "tested_nll": surprise}
        lines += ["", f"- {len(surprises)} tokens surprised by {surprise:.4f} nats each"]
    (out / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
    report.plot(out / "report.png", intervals, surprises, ("accuracy", "surprise, nats"))
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
    if tested.top != baseline.top:
        found = f"{tested.top} and {baseline.top}"
        raise Mxfp4Error("--top of the two sides", "the same", found, "Measure both with the same --top")
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
        lines += report.decision_lines(differences, args.margin)
        empty = [sum(question.empty for question in side.questions) for side in (tested, baseline)]
        lines.append(f"- empty answers, counted as wrong: tested {empty[0]}, baseline {empty[1]}")
    facts: dict[str, Any] = {"tested": tested.side, "baseline": baseline.side}
    facts |= {"paths": [tested.path, baseline.path], "margin": args.margin, "max_kl": args.max_kl}
    facts["tasks"] = {
        task: dataclasses.asdict(found)
        | {"verdict": found.verdict(args.margin), "decided_by": found.decided_by(args.margin)}
        for task, found in differences.items()
    }
    facts["changed"] = [
        {
            "task": test.task,
            "doc_id": test.doc_id,
            "question": test.asked,
            "tested": test.answer,
            "baseline": base.answer,
        }
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
    intervals = {
        task: ((found.tested - found.baseline) / found.questions, found.low, found.high)
        for task, found in differences.items()
    }
    labels = ("accuracy, tested - baseline", "KL, nats")
    report.plot(args.out / "report.png", intervals, kls, labels, args.margin, args.max_kl)
    return lines, worse
