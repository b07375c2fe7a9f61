//! Could this site go on with a guest of the built-in monitor whose copy it keeps? Looked at when its
//! primary opens a session, when it has its first point, and every minute after that.
//!
//! ```text
//!   memory and disk space ─┐
//!   files of read-only disks ─┼─▶ obstacles ─▶ Readiness ─▶ status here, and to the primary
//!   newest point: its device state, tried in a VM that is thrown away (vmm::trial) ─┘
//! ```

use std::path::Path;
use std::time::Duration;

use super::hardware::Hardware;
use super::lookup::room;
use super::standbys::{Shared, lock};
use crate::clock::Env;
use crate::device_state::DeviceState;
use crate::guest::builtin::stopped::is_stopped;
use crate::ids::GuestId;
use crate::page::Layout;
use crate::vmm::MachineSpec;
use crate::vmm::trial::trial;
use crate::wire::message::Readiness;

/// Time between two looks.
const EVERY: Duration = Duration::from_secs(60);
/// The same while there is no point to try.
const WITHOUT_POINT: Duration = Duration::from_secs(2);

/// What was found, and when to look again.
pub(super) struct Examined {
    pub readiness: Readiness,
    pub again: Duration,
}

/// Looks once.
pub(super) async fn examine(
    env: &Env,
    guest: &GuestId,
    copy: Result<Shared, String>,
    spec: &MachineSpec,
    state_dir: &Path,
) -> Examined {
    let (spec, state_dir, guest) = (spec.clone(), state_dir.to_owned(), guest.clone());
    let looking = env.offload(move || {
        // Of the copy, if there is one: the files of the guest's disks are at its own site.
        let layout = copy
            .as_ref()
            .ok()
            .and_then(|copy| lock(copy).journal().layout().cloned());
        let mut obstacles = around(&spec, layout.as_ref(), &state_dir);
        let saved = copy.and_then(|copy| newest(&copy));
        let again = match &saved {
            Ok(Some(_)) => EVERY,
            _ => WITHOUT_POINT,
        };
        match saved {
            Ok(None) => {}
            Ok(Some((spec, saved))) => {
                if let Err(error) = trial(&spec, saved) {
                    obstacles.push(error.to_string());
                }
            }
            // The status tells what is wrong with the copy itself.
            Err(error) => tracing::debug!(%guest, error, "its newest point was not tried"),
        }
        (obstacles, again)
    });
    let (obstacles, again) = looking.await;
    let readiness = Readiness {
        obstacle: (!obstacles.is_empty()).then(|| obstacles.join("; ")),
        differences: None,
    };
    Examined { readiness, again }
}

/// What can be seen without a point.
fn around(spec: &MachineSpec, layout: Option<&Layout>, state_dir: &Path) -> Vec<String> {
    let mut obstacles = Vec::new();
    obstacles.extend(layout.and_then(|layout| room(layout, state_dir, 0).err()));
    for disk in spec.disks.iter().filter(|disk| disk.read_only) {
        if !disk.path.is_file() {
            obstacles.push(format!(
                "its read-only disk \"{}\" has no file {} here: copy it from the other site",
                disk.id,
                disk.path.display()
            ));
        }
    }
    obstacles
}

/// Machine and device state of the newest point; `None` if there is no point yet.
fn newest(copy: &Shared) -> Result<Option<(MachineSpec, DeviceState)>, String> {
    let manifest = {
        let replica = lock(copy);
        let Some(epoch) = replica.journal().newest().map(|point| point.epoch) else {
            return Ok(None);
        };
        replica.journal().manifest(epoch)
    };
    let manifest = manifest.map_err(|error| error.to_string())?;
    let saved = DeviceState::from_bytes(&manifest.device_state);
    let saved = saved.map_err(|error| error.to_string())?;
    match Hardware::from_bytes(&manifest.machine)? {
        // It would be booted.
        Hardware::Builtin(_) if is_stopped(&saved) => Ok(None),
        Hardware::Builtin(spec) => Ok(Some((spec, saved))),
        Hardware::Qemu(_) => Err("it is a point of a QEMU guest".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{Region, RegionKind};
    use crate::vmm::spec::{Boot, DiskSpec};

    #[test]
    fn what_is_missing_around_is_told_with_what_to_do() {
        let state = tempfile::tempdir().unwrap();
        let there = state.path().join("tools.img");
        std::fs::write(&there, [0; 4096]).unwrap();
        let disk = |id: &str, path: &Path| DiskSpec {
            id: id.parse().unwrap(),
            path: path.to_owned(),
            read_only: true,
        };
        let mut spec = MachineSpec {
            guest: "db1".parse().unwrap(),
            memory_bytes: 32 << 20,
            vcpus: 1,
            boot: Boot::Demo {
                working_set_pages: 256,
            },
            disks: vec![disk("tools", &there)],
        };
        let layout = spec.layout().unwrap();
        assert_eq!(around(&spec, Some(&layout), state.path()), [""; 0]);
        spec.disks.push(disk("more", Path::new("/no/such/file")));
        let region = Region {
            kind: RegionKind::Ram { gpa: 0 },
            pages: 1 << 28,
        };
        let layout = Layout::try_from(vec![region]).unwrap();
        let found = around(&spec, Some(&layout), state.path());
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("memory") && found[1].contains("/no/such/file"));
    }
}
