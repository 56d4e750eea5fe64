"""The walk from a text to the next token as one self-contained page for a browser.

The page is `explain_page.html` with its script and the numbers inside; it asks the network for nothing.
"""

from __future__ import annotations

import base64
import html
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.errors import UserError
from llmctl.files import disk_errors, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from llmctl.stages.explain import Walk

HERE = Path(__file__).resolve().parent
OURS = b'<meta name="generator" content="llmctl explain">'
HEAD = 1000  # bytes of a page in which that stands
STEPS = 65535  # of a number in a map
ELSEWHERE = "name another file with --html"


def check_page(path: Path) -> None:
    """See that the page can be written, before any work is done; folders above it are made.

    Raises UserError: a folder, a file that is not a page of this command, or a place where nothing can be
    written.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder", "name a file in it")
    if path.exists():
        with disk_errors(path, ELSEWHERE), path.open("rb") as file:
            if OURS not in file.read(HEAD):
                raise UserError(f"{path}: exists, and is no page of `llmctl explain`", ELSEWHERE)
    try:
        with disk_errors(path, ELSEWHERE):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                tempfile.TemporaryFile(dir=path.parent).close()
            except PermissionError as error:
                error.filename = str(path)  # and not that of the temporary one
                raise
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: a file stands where a folder belongs", ELSEWHERE) from None
    except OSError as error:  # /proc, a name that is too long
        raise UserError(f"{path}: cannot be written ({error.strerror})", ELSEWHERE) from None


def write_page(walk: Walk, path: Path, layer: int) -> None:
    """Write the page; `layer` is the one it opens on. A page of this command is replaced."""
    write_atomic(path, page_html(walk, layer), ELSEWHERE)


def page_html(walk: Walk, layer: int) -> str:
    """The page as text."""
    from llmctl.stages.explain import as_json

    data = json.dumps(as_json(walk, packed) | {"open": layer}, ensure_ascii=False, separators=(",", ":"))
    parts = {
        "__TITLE__": html.escape(f"{walk.where}: from text to the next token"),
        "__SCRIPT__": (HERE / "explain_page.js").read_text(encoding="utf-8"),
        # the only way out of a script element is `</`, and a comment in one begins with `<!`
        "__DATA__": data.replace("<", "\\u003c"),
    }
    page = (HERE / "explain_page.html").read_text(encoding="utf-8")
    for name in ("__TITLE__", "__SCRIPT__", "__DATA__"):  # the data last: a token may be called as a part is
        before, _, after = page.partition(name)
        page = before + parts[name] + after
    return page


def packed(values: Tensor) -> dict[str, Any]:
    """A map of numbers [planes, rows, columns] in few bytes: two each, or one for yes and no."""
    shape = list(values.shape)
    if not values.dtype.is_floating_point:
        raw = values.byte().numpy().tobytes()
        return {"kind": "yes", "shape": shape, "low": 0, "high": 1, "data": base64.b64encode(raw).decode()}
    low, high = (0.0, 1.0) if bool((values >= 0).all() and (values <= 1).all()) else _ends(values)
    steps = ((values.double() - low) / max(high - low, 1e-12) * STEPS).round().clamp(0, STEPS)
    raw = steps.numpy().astype("<u2").tobytes()
    return {"kind": "share", "shape": shape, "low": low, "high": high, "data": base64.b64encode(raw).decode()}


def _ends(values: Tensor) -> tuple[float, float]:
    finite = values[values.isfinite()]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)
