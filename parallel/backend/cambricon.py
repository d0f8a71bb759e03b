"""Cambricon devices and CNCL, by the package torch_mlu. Untested on hardware here."""

from parallel.backend.base import AcceleratorBackend, Capabilities


class CambriconBackend(AcceleratorBackend):
    """MLUs; gloo stands beside CNCL for tensors that live on the host.

    Only the names are verified (against DeepSpeed); what is not known to work counts as missing.
    """

    name = "cambricon"
    device_type = "mlu"
    process_group_backend = "cpu:gloo,mlu:cncl"
    debugging = "see CNCL's manual for how it logs"
    package = "torch_mlu"
    capabilities = Capabilities(
        bf16=True, fp64=False, native_average=False, uneven_all_to_all=True, pinned_memory=True
    )
