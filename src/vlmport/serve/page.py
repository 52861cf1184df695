"""The web page at /, which runs the first model in the browser, and the files that it loads.

Where the page was not built, / is a short text with the server's paths.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

from vlmport.bundle.layouts import HUB
from vlmport.demo import FOREVER, HEADERS, PageFiles, content_type, page_folder
from vlmport.serve.api_errors import RequestError
from vlmport.serve.models import OpenModel
from vlmport.serve.service import Service

TEXT = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>vlmport</title>
<h1>vlmport serves here</h1>
<ul>
<li><a href="/docs">/docs</a>: all paths, with their fields
<li><a href="/v1/models">/v1/models</a>: the models
<li><a href="/metrics">/metrics</a>: measurements for Prometheus
</ul>
</html>
"""


def add_page(app: FastAPI, service: Service) -> None:
    """Serve the page and its files at paths that no other route has; add this route last."""
    page = page_folder()
    is_built = (page / "index.html").is_file()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        """The web page."""
        if not is_built:
            return HTMLResponse(TEXT)
        return FileResponse(page / "index.html", headers=HEADERS | {"Cache-Control": "no-cache"})

    async def file(request: Request) -> Response:
        """A file of the page, or of the first model."""
        path = request.url.path
        if path.startswith("/bundle/"):
            async with service.models.lease(service.models.default) as model:
                found = _files_of(model).find(path)
        else:
            found = PageFiles(page, None).find(path)
        if found is None:
            raise RequestError(
                f"{path[:200]}: no such path", hint="/docs lists them", code="server.no-such-path"
            )
        cached = FOREVER if path.startswith("/assets/") else "no-cache"
        headers = HEADERS | {"Cache-Control": cached}
        return FileResponse(found, media_type=content_type(found), headers=headers)

    paths = ["/assets/{name:path}", "/bundle/{name:path}"]
    if is_built:
        paths += [f"/{one.name}" for one in page.iterdir() if one.is_file()]
    for path in paths:
        app.add_api_route(path, file, methods=["GET", "HEAD"], include_in_schema=False)


def _files_of(model: OpenModel) -> PageFiles:
    bundle = model.vlm.components.bundle
    bundle.needs_layout(HUB)
    return PageFiles(page_folder(), bundle)
