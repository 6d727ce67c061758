"""Policies: which sites stay softmax. A policy reads the scan and decides; it never edits a graph."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import tomli_w

from tcal_compiler.errors import ConfigError

from .budget import BUDGETS, Budget, Costs, KeptSets, parse_budget, prefixes
from .files import read_toml
from .types import Plan, SiteScan

RANKED = ("ar", "greedy")  # by a score of each site on its own
JOINT, FORWARD = "kl", "forward"  # by scores of whole sets
MEASURED = (JOINT, *RANKED, FORWARD)
RULES = (JOINT, "greedy")  # scores of single sites that JOINT takes its candidates from
POLICIES = (
    "uniform, kl, ar, greedy or forward with :BUDGET, keep=I,J,..., none (convert all), all (convert nothing); "
    f"BUDGET: {BUDGETS}; forward:0.05nats keeps few sites for a KL of at most so much"
)


def _evenly(count: int, total: int) -> list[int]:
    """`count` of 0..total-1, evenly spaced, the first included."""
    return [i * total // count for i in range(count)]


def _explicit(text: str, indices: list[int], policy: str) -> list[int]:
    try:
        keep = [int(s) for s in text.split(",")]
    except ValueError:
        raise ConfigError(f"--policy {policy}", f"'{text}' is no list of layer numbers", "keep=0,4,8") from None
    if unknown := sorted(set(keep) - set(indices)):
        raise ConfigError(f"--policy {policy}", f"no convertible site has number {unknown}", f"sites are {indices}")
    if len(set(keep)) != len(keep):
        once = ",".join(map(str, dict.fromkeys(keep)))
        raise ConfigError(f"--policy {policy}", f"names a site twice: {keep}", f"keep={once}")
    return keep


def scored_by(policy: str) -> str | None:
    """What a policy measures (of MEASURED); None for one that needs no measurement."""
    name, colon, _ = policy.partition(":")
    return name if colon and name in MEASURED else None


def budget_of(scan: SiteScan, policy: str, seconds: Costs | None = None) -> Budget:
    """The budget of a policy NAME:BUDGET. Raises ConfigError when it is none, or out of range for these sites.

    seconds: of every site's decode step, for a budget of time.
    """
    name, _, text = policy.partition(":")
    budget = parse_budget(scan, policy, text, hint=f"policies: {POLICIES}", seconds=seconds)
    if budget.nats is not None and name != FORWARD:
        what = f"bounds a KL, which {name} does not measure of the sites that it keeps"
        raise ConfigError(f"--policy {policy}", what, f"{FORWARD}:{text}")
    return budget


def choose(
    scan: SiteScan,
    policy: str,
    scores: Mapping[int, float] | None = None,
    *,
    path: KeptSets | None = None,
    seconds: Costs | None = None,
) -> Plan:
    """The plan of a policy: POLICIES. Sites that were rejected stay as they are and are not counted.

    scores: value of each site for a policy of RANKED, which keeps the sites of largest value (equal ones: the first).
    path: for FORWARD, sets of kept sites with their KL, one more site at a time; taken only as far as it is needed.
    The plan's scores are then the KL that is left once a site is kept too. For JOINT: choose_jointly.
    seconds: see budget_of.

    Raises ConfigError for an unknown policy, a budget out of range, or scores that are needed and not there.
    """
    indices = [s.index for s in scan.sites]
    found = dict(scores or {})
    if policy == "all":
        keep = indices
    elif policy == "none":
        keep = []
    elif policy.startswith("uniform:"):
        keep = list(budget_of(scan, policy, seconds).pick(scan, _even_sets(indices))[-1][0])
    elif measure := scored_by(policy):
        budget = budget_of(scan, policy, seconds)
        ranked = None if scores is None else prefixes(sorted(indices, key=lambda i: (-scores[i], i)))
        sets = {FORWARD: path, JOINT: None}.get(measure, ranked)
        if sets is None:
            raise ConfigError(f"--policy {policy}", "needs every site measured", "tcal plan, which measures them")
        taken = budget.pick(scan, sets)
        keep = list(taken[-1][0])
        if measure == FORWARD:
            found = {i: kl for (old, _), (now, kl) in pairwise(taken) for i in set(now) - set(old)}
    elif policy.startswith("keep="):
        keep = _explicit(policy.removeprefix("keep="), indices, policy)
    else:
        raise _unknown(policy)
    return plan_that_keeps(keep, scan, policy, found)


def check_policy(policy: str) -> None:
    """Raises ConfigError for a policy that no teacher has; its budget or layers are not looked at."""
    if policy not in ("all", "none") and not policy.startswith(("uniform:", "keep=")) and scored_by(policy) is None:
        raise _unknown(policy)


def _unknown(policy: str) -> ConfigError:
    word = re.split("[:=]", policy)[0].lower()
    near = difflib.get_close_matches(word, ("all", "none", "uniform", "keep", *MEASURED), 1)
    meant = f"did you mean {near[0]}? " if near else ""
    where = f"--policy {policy if policy.strip() else repr(policy)}"
    return ConfigError(where, "unknown policy", f"{meant}policies: {POLICIES}")


def plan_that_keeps(keep: Iterable[int], scan: SiteScan, policy: str, scores: Mapping[int, float]) -> Plan:
    """The plan that keeps these sites and converts the others."""
    kept = tuple(sorted(keep))
    return Plan(kept, tuple(s.index for s in scan.sites if s.index not in kept), policy, dict(scores))


def _even_sets(indices: list[int]) -> KeptSets:
    """None, one, ... of the sites, evenly spaced."""
    return (([indices[i] for i in _evenly(n, len(indices))], math.nan) for n in range(len(indices) + 1))


def _spread_sets(indices: list[int], scores: Mapping[int, float]) -> KeptSets:
    """For n = 0, 1, ...: of each of n equal stretches of the depth the site with the largest score."""
    total = len(indices)
    for n in range(total + 1):
        stretches = (indices[i * total // n : (i + 1) * total // n] for i in range(n))
        yield [max(stretch, key=lambda i: (scores[i], -i)) for stretch in stretches], math.nan


def candidates(
    scan: SiteScan, policy: str, ranks: Mapping[str, Mapping[int, float]], seconds: Costs | None = None
) -> dict[str, tuple[int, ...]]:
    """The sets that JOINT measures within its budget, by the rule that each comes from.

    ranks: for each of RULES the scores of single sites. A rule keeps the largest scores, or the largest of each of as
    many equal stretches of the depth as sites are kept.
    """
    indices, budget = [s.index for s in scan.sites], budget_of(scan, policy, seconds)
    rules: dict[str, KeptSets] = {"uniform": _even_sets(indices)}
    for rule in RULES:
        scores = ranks[rule]
        rules[rule] = prefixes(sorted(indices, key=lambda i, s=scores: (-s[i], i)))  # type: ignore[misc]
        rules[f"{rule}, spread"] = _spread_sets(indices, scores)
    return {rule: tuple(sorted(budget.pick(scan, sets)[-1][0])) for rule, sets in rules.items()}


def choose_jointly(
    scan: SiteScan,
    policy: str,
    ranks: Mapping[str, Mapping[int, float]],
    kl: Callable[[tuple[int, ...]], float],
    seconds: Costs | None = None,
) -> Plan:
    """The plan of a policy JOINT:BUDGET: of `candidates` the set that leaves the least KL, the first of equal ones.

    kl: of the student that keeps a set, measured when it is asked for. The plan's scores are those of ranks[JOINT].
    Raises ConfigError as `choose` does.
    """
    keep = min(candidates(scan, policy, ranks, seconds).values(), key=kl)
    return plan_that_keeps(keep, scan, policy, ranks[JOINT])


def plan_to_toml(plan: Plan, scan: SiteScan) -> str:
    """An editable plan: change a site's mixer between "softmax" and "gdn" and run again."""
    sites = [
        {"layer": s.index, "module": s.layer, "mixer": "softmax" if s.index in plan.keep else "gdn"} for s in scan.sites
    ]
    fixed = [{"node": r.node, "module": r.layer, "reason": r.reason} for r in scan.rejected]
    text = '# Which attention layers stay softmax ("softmax") and which become Gated DeltaNet ("gdn").\n'
    text += tomli_w.dumps({"policy": plan.policy})
    text += "".join("\n[[site]]\n" + tomli_w.dumps(s) for s in sites)
    return text + "".join("\n[[refused]]\n" + tomli_w.dumps(r) for r in fixed)


def plan_from_toml(path: Path, scan: SiteScan) -> Plan:
    """Reads a plan back. Raises ConfigError when it is no plan of this teacher."""
    try:
        body = read_toml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            str(path), f"cannot be read as a plan: {error}", "delete it, or write it anew with tcal plan"
        ) from None
    entries = body.get("site")
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ConfigError(str(path), "has no [[site]] tables", "write it anew with tcal plan")
    if extra := sorted(set(body) - {"policy", "site", "refused"}):
        raise ConfigError(
            str(path), f"unknown keys {extra}", "keys are policy, site and refused; settings are options of the command"
        )
    policy = body.get("policy", "plan.toml")
    if not isinstance(policy, str):
        raise ConfigError(str(path), f"policy is {policy!r}", "a text in quotes; it only says where the plan came from")
    mixers: dict[int, str] = {}
    for e in entries:
        layer, mixer = e.get("layer"), e.get("mixer")
        if not isinstance(layer, int) or isinstance(layer, bool) or layer in mixers:
            raise ConfigError(str(path), f"layer {layer!r} is no number or stands twice", "one [[site]] for each layer")
        if mixer not in ("softmax", "gdn"):
            raise ConfigError(str(path), f"layer {layer}: mixer is {mixer!r}", 'write "softmax" or "gdn"')
        if extra := sorted(set(e) - {"layer", "module", "mixer"}):
            raise ConfigError(str(path), f"layer {layer}: unknown keys {extra}", "keys are layer, module and mixer")
        mixers[layer] = mixer
    indices = [s.index for s in scan.sites]
    if sorted(mixers) != indices:
        raise ConfigError(
            str(path), f"names layers {sorted(mixers)}", f"this teacher's convertible sites are {indices}"
        )
    keep = tuple(i for i in indices if mixers[i] == "softmax")
    return Plan(keep, tuple(i for i in indices if mixers[i] == "gdn"), policy)
