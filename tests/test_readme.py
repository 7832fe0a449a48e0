"""The README says what the index notebook says, and its links lead somewhere."""
import re

from readme import ROOT, readme


def test_readme_is_made_from_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `make readme` and commit README.md"


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", readme())
    assert links
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing
