"""FedIT: clients that average factors against clients on their own."""

from experiments.claims import federated_text

CLAIM = federated_text.claim(
    name="fedit",
    system="FedIT, the average of factors",
    program=federated_text.FEDIT,
    baseline=federated_text.ALONE,
    reference="Zhang 2023, 2305.05644: better than local training",
)
