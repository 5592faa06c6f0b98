//! The capabilities that remain.

use caps::{CapSet, Capability, CapsHashSet};
use rustix::io::Errno;

/// What serving files for users of all kinds needs: making files theirs and acting as them, and
/// opening a file by its handle (`CAP_DAC_READ_SEARCH`), without which each file that the guest knows
/// would need an open descriptor.
///
/// Not among them: making device nodes (`CAP_MKNOD`) and giving files capabilities (`CAP_SETFCAP`),
/// by which a guest could leave something on the host that raises its users' rights.
const KEPT: [Capability; 7] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
];

/// A privilege cannot be given up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrivilegeError {
    /// A set of capabilities cannot be reduced.
    #[error("cannot reduce the {set:?} capabilities")]
    Capabilities {
        /// Which.
        set: CapSet,
        /// Why not.
        #[source]
        source: caps::errors::CapsError,
    },
    /// Executing programs cannot be kept from raising privileges.
    #[error("cannot set no_new_privs")]
    NoNewPrivs(#[source] Errno),
}

/// Gives up everything but [`KEPT`], for good.
pub(crate) fn give_up() -> Result<(), PrivilegeError> {
    rustix::thread::set_no_new_privs(true).map_err(PrivilegeError::NoNewPrivs)?;
    let failed = |set| move |source| PrivilegeError::Capabilities { set, source };
    let kept: CapsHashSet = KEPT.into_iter().collect();
    let bounding = caps::read(None, CapSet::Bounding).map_err(failed(CapSet::Bounding))?;
    for capability in bounding.difference(&kept) {
        caps::drop(None, CapSet::Bounding, *capability).map_err(failed(CapSet::Bounding))?;
    }
    caps::clear(None, CapSet::Ambient).map_err(failed(CapSet::Ambient))?;
    caps::clear(None, CapSet::Inheritable).map_err(failed(CapSet::Inheritable))?;
    // Those that it has of them: not all, where husk itself has less.
    let permitted = caps::read(None, CapSet::Permitted).map_err(failed(CapSet::Permitted))?;
    let kept = permitted.intersection(&kept).copied().collect();
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, &kept).map_err(failed(set))?;
    }
    Ok(())
}
