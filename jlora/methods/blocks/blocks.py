"""What methods of square blocks have in common."""

from jlora.core.site import Site


def check_divides(name: str, block: int, site: Site) -> None:
    """Refuses blocks that do not divide a matrix.

    Args:
      name: of the method, for the error.
      block: side of a block.
      site: whose matrix is cut into blocks.

    Raises:
      ValueError: block does not divide d_in and d_out.
    """
    if site.d_in % block or site.d_out % block:
        raise ValueError(
            f"{site.path}: {name} block: got {block}, expected a divisor of d_in = {site.d_in} and "
            f"d_out = {site.d_out}"
        )
