//! Networks of guests, for plans: which there are, and a new address in a guest that runs here.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::backend::Site;
use super::exports::hold;
use super::hardware::Hardware;
use super::orders::Handle;
use super::promotion::failed;
use crate::control::codes::Reason;
use crate::control::types::{AddressRequest, ApiError, Networks};
use crate::guest::network::ADDRESS_WITHIN_MAX;
use crate::guest::qemu::agent::{self, AgentError};
use crate::guest::qemu::command::{self, Sockets};
use crate::guest::qemu::network;
use crate::ids::GuestId;

/// The networks of a guest: of its machine here if it runs, or else of the one in its newest point.
pub(super) async fn of(site: &Site, guest: &GuestId) -> Result<Networks, ApiError> {
    let handle = site.guests().get(guest).map(|(handle, _)| handle.clone());
    let running = handle.and_then(|handle| {
        let view = handle.view.borrow();
        view.pid.and(view.machine.clone())
    });
    let hardware = match running {
        Some(hardware) => hardware,
        None => {
            let (copy, owned) = (site.copy(guest).await?, guest.clone());
            let env = &site.context.env;
            let reading = env.offload(move || {
                let held = hold(&copy, &owned, None)?;
                held.machine().map_err(failed)
            });
            Hardware::from_bytes(&reading.await?).map_err(failed)?
        }
    };
    let (networks, agent) = match &hardware {
        Hardware::Qemu(machine) => (
            network::networks(&machine.command),
            command::has_agent(machine),
        ),
        Hardware::Builtin(_) => (Vec::new(), false),
    };
    Ok(Networks {
        guest: guest.clone(),
        networks,
        agent,
    })
}

/// Whether nobody listens there.
fn is_nobody(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), NotFound | ConnectionRefused)
}

/// Has the agent of a guest give an interface an address. Says what was done.
pub(super) async fn address(
    handle: Handle,
    run_dir: &Path,
    guest: &GuestId,
    request: AddressRequest,
) -> Result<String, ApiError> {
    let usage = |why: String| ApiError::new(Reason::Usage, why);
    let address = request.address;
    address.check().map_err(usage)?;
    let within = Duration::try_from_secs_f64(request.within_seconds).unwrap_or_default();
    if within.is_zero() || within > ADDRESS_WITHIN_MAX {
        let most = ADDRESS_WITHIN_MAX.as_secs();
        let why = format!("within_seconds has to be above 0 and at most {most}");
        return Err(usage(why));
    }
    let socket = {
        let view = handle.view.borrow();
        match (view.pid, &view.machine) {
            (None, _) => {
                let text = format!("guest \"{guest}\" does not run at this site");
                return Err(ApiError::new(Reason::WrongState, text));
            }
            (_, Some(Hardware::Qemu(machine))) => command::agent_socket(machine),
            _ => None,
        }
    };
    let socket = socket.ok_or_else(|| {
        let text = format!("guest \"{guest}\" has no guest agent that can be reached");
        ApiError::new(Reason::WrongState, text)
            .hint("name a hook of this site in the plan, or give the guest a port for its agent")
    })?;
    let environment: Vec<(&str, String)> = [("LIFEBOAT_GUEST", guest.to_string())]
        .into_iter()
        .chain(address.environment())
        .collect();
    // A QEMU of ours has it beside our monitors, whatever its machine said at its old site.
    let own = Sockets::within(run_dir).agent;
    // Its point may be one of applications at rest, and a frozen agent runs nothing. If it cannot, that shows now.
    let _ = agent::thaw(&own, within).await;
    let mut ran = agent::run(&own, &address.commands(), &environment, within).await;
    if matches!(&ran, Err(AgentError::Io(error)) if is_nobody(error)) {
        ran = agent::run(&socket, &address.commands(), &environment, within).await;
    }
    match ran {
        Ok(()) => {
            tracing::info!(%guest, %address, "the guest has a new address");
            Ok(address.to_string())
        }
        Err(error) => Err(failed(format!("guest \"{guest}\": {error}"))
            .hint("set it inside the guest; its console may help: lifeboat guest console")),
    }
}
