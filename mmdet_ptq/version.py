"""The one place that holds the version."""

__version__ = '0.2.0'
# Of what stages and measurements leave in a work directory: a run resumes what this format left. It changes when the
# same config no longer leads to the same state, which a new version alone does not mean; 0.1.0 wrote its version here.
STATE_FORMAT = '0.1.0'
