"""The one way from a template to a page."""

from __future__ import annotations

from estimator.errors import MissingError


def render_template(name: str, **values: object) -> str:
    """A template of ``reports/templates``; values are escaped, and one that is missing is an error. Raises MissingError."""
    try:
        import jinja2
    except ImportError:
        raise MissingError("report: needs jinja2; pip install 'vramcalc-toolkit[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(**values)
