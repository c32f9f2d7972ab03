"""Input that this rank refuses: before it joins the others, they are told the reason.

Imports PyTorch only if there are other ranks to tell.
"""

from launcher.environment.detection import LaunchEnvironment

_TELLING_SECONDS = 60.0


class Refusal:
    """The ranks that have to be told about input that this process refuses."""

    def __init__(self) -> None:
        self._environment: LaunchEnvironment | None = None

    def expect_others(self, environment: LaunchEnvironment) -> None:
        """Tell the other ranks of this environment from now on. torchrun, srun and mpirun themselves end the others."""
        if environment.is_rank and environment.store_host == "scheduler" and environment.world_size != 1:
            self._environment = environment

    def end(self) -> None:
        """Stop telling: the ranks have met and exchange their errors."""
        self._environment = None

    def tell(self, reason: str) -> None:
        """Tell the other ranks, if there are any."""
        environment, self._environment = self._environment, None
        if environment is not None:
            from launcher.rendezvous.refused_input import tell_refusal

            tell_refusal(environment, reason, min(environment.join_seconds or _TELLING_SECONDS, _TELLING_SECONDS))


refusal = Refusal()
"""The instance of this process."""
