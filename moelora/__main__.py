"""``python -m moelora``."""

from moelora.cli.main import app

if __name__ == "__main__":
    app()
