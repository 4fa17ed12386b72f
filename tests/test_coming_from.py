"""The pages for those who come from another library: their blocks run, where that library is installed."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("library", ["spikingjelly", "snntorch", "norse", "sinabs", "rockpool"])
@pytest.mark.filterwarnings("ignore")
def test_the_page_runs(library, one_thread, monkeypatch, tmp_path, capsys):
    """The network before, after, and written anew: outputs, and the shares of spikes that differ, agree."""
    pytest.importorskip(library)
    page = DOCS / f"from-{library}.md"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        exec(compile(block, page.name, "exec"), names)
    said = capsys.readouterr().out
    shares = [float(each) for each in re.findall(r"tensor\((.*?)\)", said)]
    assert all(share < 0.01 for share in shares) and len(shares) + said.count("outputs: ") > 0
    assert "left 0: none" in said or library == "snntorch"
