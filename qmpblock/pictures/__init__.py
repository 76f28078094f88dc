"""Drawings of maps, as text and as SVG: strings out. Pure."""
