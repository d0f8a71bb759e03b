"""torch, and which backends it can use: asked in children, which may fail without harm to us."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from launch.doctor.row import Row

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
_SECONDS = 120.0
_PROBE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    from parallel.backend.select import BACKENDS, select_backend
    reasons = {name: kind().why_unavailable() for name, kind in BACKENDS.items()}
    chosen, refusal = None, None
    try:
        chosen = select_backend(sys.argv[1]).name
    except (ValueError, RuntimeError) as error:
        refusal = str(error)
warned = sorted({str(one.message) for one in said if "backend " in str(one.message)})
print(json.dumps({"torch": torch.__version__, "reasons": reasons, "chosen": chosen,
                  "refusal": refusal, "warned": warned}))
"""
"""Runs in a child: what torch is there, and why each backend can or cannot be used."""


@dataclass(frozen=True)
class Probe:
    """What was found out."""

    rows: list[Row]
    chosen: str | None
    """The backend to run the suite on; None if there is none."""


def probe_torch(wanted: str) -> Probe:
    """Rows for torch and every backend.

    Args:
        wanted: name of a backend, or `auto`.
    """
    rows = [_plain_import(name) for name in _autoloaded()]
    code, out, said = _run([sys.executable, "-c", _PROBE, wanted], {_AUTOLOAD: "0"})
    if code != 0:
        problem = "\n".join(said.strip().splitlines()[-3:]) or f"exit code {code}"
        fix = "pip install -c constraints.txt torch (or make install)"
        return Probe([*rows, Row(name="torch", ok=False, problem=problem, fix=fix)], None)
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    rows.append(Row(name="torch", ok=True, found=answer["torch"]))
    for name, reason in answer["reasons"].items():
        rows.append(_backend(name, reason, answer["chosen"]))
    rows += [_broken(text) for text in answer["warned"]]
    if answer["refusal"] is not None:
        rows.append(
            Row(
                name=f"backend {wanted}",
                ok=False,
                problem=answer["refusal"],
                fix="mneme doctor --backend cpu checks the host",
            )
        )
    return Probe(rows, answer["chosen"])


def _backend(name: str, reason: str | None, chosen: str | None) -> Row:
    found = "available" if reason is None else reason
    if name == chosen:
        found += "; checked below"
    return Row(name=f"backend {name}", ok=True if reason is None else None, found=found)


def _broken(warning: str) -> Row:
    """A vendor's package that is installed and cannot be imported."""
    return Row(
        name="vendor's package",
        ok=None,
        found=warning,
        fix=(
            "on a machine with the device, install its driver and toolkit, and source their "
            "environment (Ascend: source /usr/local/Ascend/ascend-toolkit/set_env.sh); on another "
            "one nothing needs to be done, or uninstall the package"
        ),
    )


def _autoloaded() -> list[str]:
    """Packages that `import torch` imports unless it is told not to."""
    return sorted(
        {one.dist.name if one.dist else one.name for one in entry_points(group="torch.backends")}
    )


def _plain_import(package: str) -> Row:
    """Whether `import torch` works for whoever types it, with this package installed."""
    name = f"import torch with {package}"
    code, _, said = _run([sys.executable, "-c", "import torch"], {_AUTOLOAD: None})
    if code == 0:
        return Row(name=name, ok=True, found="works")
    lines = [line for line in said.strip().splitlines() if line.strip()]
    reason = next(
        (line for line in reversed(lines) if "Error" in line and ".so" in line), lines[-1]
    )
    return Row(
        name=name,
        ok=None,
        found=f"fails: {reason.strip()}",
        problem="commands of mneme are not affected: they import torch without it",
        fix=f"for programs of your own: export {_AUTOLOAD}=0, or source the vendor's environment "
        "(Ascend: source /usr/local/Ascend/ascend-toolkit/set_env.sh)",
    )


def _run(command: list[str], environment: dict[str, str | None]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a child; None removes a variable."""
    merged = {name: value for name, value in os.environ.items() if name not in environment}
    merged |= {name: value for name, value in environment.items() if value is not None}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, env=merged, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, "", f"no answer in {_SECONDS:g} s"
    return done.returncode, done.stdout, done.stderr
