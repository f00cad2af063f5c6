"""Finding adapters: similarity, duplicates and clusters of a bank, retrieval by text."""

from jlora.retrieval.banks import cluster as cluster
from jlora.retrieval.banks import duplicates as duplicates
from jlora.retrieval.banks import retrieve as retrieve
