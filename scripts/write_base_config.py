"""Write configs/base.yaml from the keys that the code declares: `python scripts/write_base_config.py` (a second)."""

from pathlib import Path

from xdpo.config.explain import base_yaml

if __name__ == "__main__":
    path = Path(__file__).resolve().parent.parent / "configs" / "base.yaml"
    path.write_text(base_yaml(), encoding="utf-8")
    print(path)
