"""Pages of the site that lie at the root of the repository: CONTRIBUTING.md and CHANGELOG.md."""

import pathlib

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[2]


def on_files(files, config):
  """Adds the two, their links made those of pages: `docs/x.md` is `x.md` here."""
  for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
    text = (ROOT / name).read_text().replace("](docs/", "](")
    files.append(File.generated(config, name.lower(), content=text))
  return files
