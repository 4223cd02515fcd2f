"""Notebooks as their users have them: a real kernel of Jupyter."""

import re
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.blocking.client import BlockingKernelClient
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


class Notebook:
    """A running kernel, as a notebook asks it."""

    def __init__(self, client: BlockingKernelClient) -> None:
        self._client = client

    def run(self, code: str) -> list[tuple[str, dict[str, Any]]]:
        """Run a cell, and return what it puts out: the kind of each message and its content."""
        found: list[tuple[str, dict[str, Any]]] = []
        answer = self._client.execute_interactive(
            code, output_hook=lambda told: found.append((told["msg_type"], told["content"])), timeout=120
        )
        found += [("help", one) for one in answer["content"].get("payload", [])]
        return [one for one in found if one[0] not in ("status", "execute_input")]

    def screen(self, code: str) -> list[str]:
        """Run a cell, and return the lines of text that it leaves, as a terminal or a notebook shows them."""
        return lines("".join(content["text"] for kind, content in self.run(code) if kind == "stream"))

    def complete(self, code: str) -> list[str]:
        """Return what the tab key offers behind some code."""
        self._client.complete(code, len(code))
        matches: list[str] = self._client.get_shell_msg(timeout=60)["content"]["matches"]
        return matches


def lines(text: str) -> list[str]:
    """Return what is left on a screen: each carriage return begins its line again; without colours."""
    plain = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", text)
    shown = []
    for line in plain.split("\n"):
        left = ""
        for part in line.split("\r"):
            left = part + left[len(part) :]
        shown.append(left.rstrip())
    return shown


def executed(*more: str) -> Any:
    """Run the tour, and more cells behind its own; return the notebook with its outputs."""
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in more]
    folder = {"metadata": {"path": str(EXAMPLES)}}
    return NotebookClient(notebook, kernel_name="python3", resources=folder, coalesce_streams=True).execute()
