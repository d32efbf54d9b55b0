"""The code of docs/realize.md runs as it stands, and its figures are those of the committed results."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/realize.md").read_text(encoding="utf-8")


def test_the_code_runs(capsys):
    exec("".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), {})
    model, bits, back, layer, linear, *orders = capsys.readouterr().out.strip().splitlines()
    assert model.startswith("LTI(2 states")
    assert float(model.rsplit(None, 1)[1]) < 0.01
    assert bits.endswith("()")
    assert max(map(float, back.split())) < 1e-12
    assert float(layer.split()[-1]) < 1e-5
    assert float(linear) < 1e-5
    assert len(orders) == 3
    assert float(orders[2].split()[-1]) < 1e-2 * float(orders[0].split()[-1])


def test_the_table_is_that_of_the_results():
    found = json.loads((ROOT / "docs/results/identify/results.json").read_text())["summary"]
    heads = {"cva": "`cva`, 4 states", "cva, order by AIC": "`cva`, order by AIC",
             "n4sid, 6 block rows": "SLICOT's N4SID, 6 block rows", "n4sid, 10 block rows": "10 block rows",
             "n4sid, 15 block rows": "15 block rows"}  # fmt: skip
    for name, head in heads.items():
        short, long = found["2000"][name], found["20000"][name]
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {head} |")]
        means = re.findall(r"0\.\d{4}", line)
        assert means[:2] == [f"{short['mean']:.4f}", f"{long['mean']:.4f}"]
        if name == "cva":
            assert means[2] == f"{long['largest']:.4f}"
        if "n4sid" in name:
            assert f"| {short['ours_lower']} and {long['ours_lower']} " in line


def test_links_are_there():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
