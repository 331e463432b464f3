"""What holds where a policy says nothing (docs/policy.md, "Defaults")."""

from __future__ import annotations

from typing import Any

SITE: dict[str, Any] = {
    "name": "", "contact": "", "closed": "", "multi_user": "no", "modes": {}, "on_internal_error": "deny", "internal_error_profile": "strict",
    "minimum_assurance": "credential", "liability_for": [],
}

#: Variables that describe the slot, the batch job, the site and the VO's software: what pilots' payloads were seen to need. None names a
#: credential: the payload gets its own.
KEEP = [
    "JOBFEATURES", "MACHINEFEATURES", "_CONDOR_*", "_CHIRP_*", "SLURM_*", "PBS_*", "LSB_*", "SGE_*", "JOB_ID", "BATCH_SYSTEM",
    "OMP_*", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "GOMAXPROCS", "JULIA_NUM_THREADS", "CUBACORES", "ROOT_MAX_THREADS",
    "TF_NUM_THREADS", "TF_LOOP_PARALLEL_ITERATIONS", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
    "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "FTP_PROXY", "ftp_proxy", "CVMFS_*", "FRONTIER_SERVER",
    "GLIDEIN_*", "OSG_*", "VO_*", "ATLAS_*", "CMS_*", "ALICE_*", "LHCB*", "DIRAC*", "XRD_*", "PandaID", "PANDA_*", "RUCIO_*",
    "X509_CERT_DIR", "X509_VOMS_DIR", "X509_VOMSES", "SCHEDD_NAME", "TZ", "LANG", "LC_*", "TERM",
]
#: Names that the list above would keep, and that lead to what is the pilot's own.
STRIP = [
    "_CONDOR_CREDS", "_CONDOR_CONDOR_IDS", "_CONDOR_*PASSWORD*", "_CONDOR_SEC_*", "GLIDEIN_*TOKEN*", "GLIDEIN_*Token*", "GLIDEIN_*CRED*",
    "GLIDEIN_*PROXY*", "*_TOKEN", "*_TOKEN_FILE", "*_SECRET", "*_PASSWORD", "*_PASSWD", "*_API_KEY", "RUCIO_AUTH_*", "DIRAC_X509_*", "DIRACOS_X509_*",
    "SLURM_JWT", "PANDA_AUTH_*",
]

#: grace: between TERM and KILL. wall 0: the guard's maximum. core 0: a dump could hold a credential.
LIMITS: dict[str, Any] = {"wall": 0, "grace": 10, "core": 0, "processes": 16384, "files": 65536, "on_missing": "degrade"}

#: Attributes of `nodewrap.credentials.trust.Options`.
CREDENTIALS: dict[str, Any] = {
    "allow_limited": True, "allow_plain": False, "allow_without_voms": False, "clock_skew": 300, "max_proxy_lifetime": 0,
    "crl": "if-present", "signing_policy": "require",
}
APPTAINER: dict[str, Any] = {"program": "/usr/bin/apptainer", "bind": [], "options": []}
GLEXEC: dict[str, Any] = {"profile": "compat", "preserve_env": []}
