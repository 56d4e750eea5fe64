"""Runs one part: `python -m gpu_parts.child gpu_parts.device:run --rows FILE …`; `running.py` starts it.

The last line of the file says how the part ended, unless the process was killed before that.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import json
import os
import threading
import time
import traceback
from pathlib import Path

from gpu_parts.report import Report, describe, is_ours

BEFORE_THE_END = 0.5  # seconds before the time limit at which the log is told where the part stands


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("target", help="MODULE:FUNCTION, which takes a Report")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(0.1, given.seconds - BEFORE_THE_END))
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    ended = run(given)
    with given.rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"ended": ended}) + "\n")


def run(given: argparse.Namespace) -> dict[str, str]:
    """Run the part; returns its status and the reason where that is not ok."""
    module, _, function = given.target.partition(":")
    report = Report(given.rows, given.device, given.tiny, 0.9 * given.seconds)
    try:
        part = getattr(importlib.import_module(module), function)
        gc.freeze()  # what was imported stays: to look through it after every case would take a tenth of a second
        part(report)
    except ModuleNotFoundError as error:
        kind = "failed" if is_ours(error) else "skipped"
        return {"status": kind, "reason": f"no package {error.name}"}
    except Exception as error:
        traceback.print_exc()
        return {"status": "failed", "reason": describe(error)}
    return {"status": "ok"}


def end_with_parent(parent: int) -> None:
    """End this process once whoever started it is gone: nothing may keep the GPU busy unseen."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
