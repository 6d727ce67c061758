"""Policies: which sites stay softmax. A policy reads the scan and decides; it never edits a graph."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import tomli_w

from tcal_compiler.errors import ConfigError

from .budget import BUDGETS, Budget, KeptSets, parse_budget, prefixes
from .files import read_small
from .types import Plan, SiteScan

SCORED, FORWARD = ("kl", "ar", "greedy"), "forward"
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
    """The measure that a policy ranks sites by (SCORED, or FORWARD); None for one that needs no measurement."""
    name, colon, _ = policy.partition(":")
    return name if colon and name in (*SCORED, FORWARD) else None


def budget_of(scan: SiteScan, policy: str) -> Budget:
    """The budget of a policy NAME:BUDGET. Raises ConfigError when it is none, or out of range for these sites."""
    name, _, text = policy.partition(":")
    budget = parse_budget(scan, policy, text, hint=f"policies: {POLICIES}")
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
) -> Plan:
    """The plan of a policy: POLICIES. Sites that were rejected stay as they are and are not counted.

    scores: value of each site for a policy of SCORED, which keeps the sites of largest value (equal ones: the first).
    path: for FORWARD, sets of kept sites with their KL, one more site at a time; taken only as far as it is needed.
    The plan's scores are then the KL that is left once a site is kept too.

    Raises ConfigError for an unknown policy, a budget out of range, or scores that are needed and not there.
    """
    indices = [s.index for s in scan.sites]
    found = dict(scores or {})
    if policy == "all":
        keep = indices
    elif policy == "none":
        keep = []
    elif policy.startswith("uniform:"):
        even = [([indices[i] for i in _evenly(n, len(indices))], math.nan) for n in range(len(indices) + 1)]
        keep = list(budget_of(scan, policy).pick(scan, even)[-1][0])
    elif measure := scored_by(policy):
        budget = budget_of(scan, policy)
        ranked = None if scores is None else prefixes(sorted(indices, key=lambda i: (-scores[i], i)))
        sets = path if measure == FORWARD else ranked
        if sets is None:
            raise ConfigError(f"--policy {policy}", "needs every site measured", "tcal plan, which measures them")
        taken = budget.pick(scan, sets)
        keep = list(taken[-1][0])
        if measure == FORWARD:
            found = {i: kl for (old, _), (now, kl) in pairwise(taken) for i in set(now) - set(old)}
    elif policy.startswith("keep="):
        keep = _explicit(policy.removeprefix("keep="), indices, policy)
    else:
        where = f"--policy {policy if policy.strip() else repr(policy)}"
        raise ConfigError(where, "unknown policy", f"policies: {POLICIES}")
    kept = tuple(sorted(keep))
    return Plan(kept, tuple(i for i in indices if i not in set(kept)), policy, found)


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
        body = tomllib.loads(read_small(path).decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(
            str(path), f"cannot be read as a plan: {error}", "delete it, or write it anew with tcal plan"
        ) from None
    entries = body.get("site")
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ConfigError(str(path), "has no [[site]] tables", "write it anew with tcal plan")
    if extra := sorted(set(body) - {"policy", "site", "refused"}):
        raise ConfigError(str(path), f"unknown keys {extra}", "keys are policy, site and refused")
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
