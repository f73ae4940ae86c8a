"""The version: read by the build, kept in what qtool writes."""

__version__ = "0.1.0"


def bugs_address() -> str | None:
    """Where bugs are reported: the Issues address among `[project.urls]`, kept in the installed package's metadata."""
    from importlib import metadata

    try:
        urls = metadata.metadata("qtool").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    return next((url.partition(",")[2].strip() for url in urls if url.lower().startswith("issues,")), None)
