"""The user's own `./conf`, searched before the packaged one. Thin: Hydra imports it at every start."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class OwnConfigurations(SearchPathPlugin):
    """Puts `conf/` of the current folder first, if it is for us, in commands of ours and in no other application's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folder = Path.cwd() / "conf"
        if not folder.is_dir():
            return
        from sweeper.installation import CONF

        main = [one.path for one in search_path.get_path() if one.provider == "main"]
        if [Path(path.removeprefix("file://")) for path in main] == [CONF] and is_ours(folder, CONF):
            search_path.prepend(provider="own", path=f"file://{folder}", anchor="main")


def is_ours(folder: Path, packaged: Path) -> bool:
    """Whether a folder of configurations adds to the packaged ones: it has a group of the same name.

    Many projects have `conf/model/`. One with a primary configuration is ours if that speaks of placement.
    """
    if folder.samefile(packaged):
        return False
    groups = [one.name for one in packaged.iterdir() if one.is_dir()]
    primary = folder / "config.yaml"
    if primary.is_file() and "placement" not in primary.read_text(encoding="utf-8"):
        return False
    return any((folder / name).is_dir() for name in groups)
