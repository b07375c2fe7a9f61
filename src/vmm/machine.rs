//! One machine: built or restored, run, paused, saved, harvested, stopped.
//!
//! ```text
//!   boot ─────┐            resume                      stop
//!             ├─▶ Paused ◀────────▶ Running ─────┬──────────▶ Stopped(cause)
//!   restore ──┘            pause                 └──────────▶ Failed(cause)
//!
//!   pause = hold devices (request in flight ends, vCPUs still run)
//!         + close the gate (vCPUs leave the guest, accesses complete, state is captured)
//! ```
//!
//! While the machine is paused, nothing of it changes: RAM, disks, device and vCPU state. `save` only
//! writes down what the pause captured.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::VcpuFd;

use crate::bitmap::PageSet;
use crate::device_state::DeviceState;
use crate::guest::RunState;
use crate::page::{Layout, RegionId};
use crate::vmm::boot::{self, Entry};
use crate::vmm::brake::Brake;
use crate::vmm::devices::block;
use crate::vmm::devices::bus::Bus;
use crate::vmm::devices::genid::GenId;
use crate::vmm::devices::serial::{COM1_IRQ, SerialPort};
use crate::vmm::devices::virtio_mmio::{VIRTIO_IRQ, VirtioMmio};
use crate::vmm::devices::watch::DiskWatch;
use crate::vmm::gate::Gate;
use crate::vmm::kvm::{IrqLine, Vm};
use crate::vmm::state::{self, VcpuCapture, VmState};
use crate::vmm::{Console, Disk, GuestRam, MachineSpec, Shell, VmmError, cpuid, vcpu};

/// Version of the device sections.
const VERSION: u16 = 1;

/// A machine. All methods may be called from any thread. Dropping it stops it.
pub struct Machine {
    spec: MachineSpec,
    layout: Layout,
    ram: Arc<GuestRam>,
    disks: Vec<Arc<Disk>>,
    watch: DiskWatch,
    console: Console,
    vm: Vm,
    gate: Arc<Gate>,
    brake: Arc<Brake>,
    bus: Arc<Bus>,
    /// Held by whoever changes the run state, so that pause and resume do not interleave.
    control: Mutex<Threads>,
}

#[derive(Default)]
struct Threads {
    vcpus: Vec<JoinHandle<()>>,
    devices: Vec<JoinHandle<()>>,
    stopped: bool,
}

/// What a new machine begins with.
enum First {
    Boot(Entry),
    Restore(DeviceState),
}

impl Machine {
    /// Builds the machine in its first state. It is paused and nothing ran yet.
    pub fn boot(spec: &MachineSpec) -> Result<Machine, VmmError> {
        let ram = GuestRam::anonymous(spec)?;
        let entry = boot::load(spec, &ram)?;
        Self::build(spec, Shell::over(ram)?, First::Boot(entry))
    }

    /// Builds the machine in a saved state. It is paused; the shell holds the memory of that state, the
    /// disk files their content.
    pub fn restore(
        spec: &MachineSpec,
        shell: Shell,
        state: DeviceState,
    ) -> Result<Machine, VmmError> {
        Self::build(spec, shell, First::Restore(state))
    }

    /// As `boot`, with another payload in the place of the embedded one.
    #[cfg(test)]
    pub(crate) fn boot_payload(spec: &MachineSpec, elf: &[u8]) -> Result<Machine, VmmError> {
        let ram = GuestRam::anonymous(spec)?;
        let entry = boot::load_payload(spec, elf, &ram)?;
        Self::build(spec, Shell::over(ram)?, First::Boot(entry))
    }

    fn build(spec: &MachineSpec, shell: Shell, mut first: First) -> Result<Machine, VmmError> {
        let layout = spec.layout()?;
        if !shell.fits(spec) {
            return Err(VmmError::Spec(
                "its RAM was made for another description".into(),
            ));
        }
        let disks = open_disks(spec, &layout)?;
        let Shell { ram, vm } = shell;
        let vcpus = spec.vcpus as usize;
        let fd = vm.fd.clone();
        let gate = Arc::new(Gate::new(vcpus, Box::new(move || VmState::capture(&fd))));
        let console = Console::default();
        // Before the interrupt controllers are restored: a restored serial port may raise its line
        // once more, and that is overwritten then.
        let bus = devices(&mut first, &disks, &ram, &vm, &gate, &console)?;
        if let First::Restore(state) = &mut first {
            state::take_machine(spec, state)?;
            state::take_vm(state)?.restore(&vm.fd)?;
        }
        let fds = vcpus_of(spec, &vm, &mut first)?;
        if let First::Restore(state) = first {
            state.finish()?;
        }
        let machine = Machine {
            spec: spec.clone(),
            layout,
            ram,
            watch: DiskWatch::new(&disks),
            disks,
            console,
            vm,
            brake: Brake::new(Arc::clone(&gate)),
            gate,
            bus: Arc::new(bus),
            control: Mutex::new(Threads::default()),
        };
        machine.start_threads(fds)?;
        Ok(machine)
    }

    fn start_threads(&self, fds: Vec<(VcpuFd, VcpuCapture)>) -> Result<(), VmmError> {
        let mut threads = self.control();
        let mut failed = None;
        for (index, (fd, capture)) in fds.into_iter().enumerate() {
            if failed.is_none() {
                let (bus, gate) = (self.bus.clone(), self.gate.clone());
                match vcpu::spawn(index, fd, capture, bus, gate) {
                    Ok(thread) => threads.vcpus.push(thread),
                    Err(error) => failed = Some(error),
                }
            }
            if failed.is_some() {
                // It will not come to the gate; nobody is to wait for it.
                self.gate.unregister(index);
            }
        }
        for (disk, transport) in self.disks.iter().zip(&self.bus.virtio) {
            let (ram, gate) = (self.ram.clone(), self.gate.clone());
            let thread = block::spawn(disk.clone(), transport.clone(), ram, gate);
            match thread {
                Ok(thread) => threads.devices.push(thread),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn control(&self) -> MutexGuard<'_, Threads> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the vCPUs and devices run. Does nothing if the guest has ended.
    pub fn resume(&self) {
        let _control = self.control();
        self.watch.begin();
        self.gate.resume();
        if self.gate.state() == RunState::Running {
            self.release();
        }
    }

    fn release(&self) {
        self.bus.serial.release();
        self.bus.virtio.iter().for_each(|d| d.release());
    }

    /// Makes devices finish the request in flight and begin no other, while the vCPUs go on. Called
    /// before [`pause`](Self::pause) it keeps the time of a slow disk out of the guest's pause;
    /// `pause` does it by itself otherwise. Ends with `resume`.
    pub fn hold_devices(&self) -> Result<(), VmmError> {
        self.hold(&self.control())
    }

    fn hold(&self, _control: &Threads) -> Result<(), VmmError> {
        self.bus.serial.hold();
        let held: Result<(), VmmError> = self.bus.virtio.iter().try_for_each(|d| d.hold());
        if held.is_err() && self.gate.state() == RunState::Running {
            self.release();
        }
        held
    }

    /// Stops vCPUs and devices until `resume`. An error leaves the guest running, or tells why it
    /// cannot run any more.
    pub fn pause(&self) -> Result<(), VmmError> {
        let control = self.control();
        self.hold(&control)?;
        self.gate.pause()
    }

    /// Takes so many percent of their time from the vCPUs (at most 90) until the next call, for at most
    /// `within` (30 s). An error says that it cannot.
    pub fn slow(&self, percent: u8, within: Duration) -> std::io::Result<()> {
        self.brake.order(percent, within)
    }

    /// The state of vCPUs and devices. Only while paused.
    pub fn save(&self) -> Result<DeviceState, VmmError> {
        let _control = self.control();
        let mut to = DeviceState::default();
        self.gate
            .captured(|vm, vcpus| state::save(&self.spec, vm, vcpus, &mut to))?;
        to.put("serial", VERSION, &self.bus.serial.save());
        to.put("genid", VERSION, &self.bus.genid);
        for (disk, transport) in self.disks.iter().zip(&self.bus.virtio) {
            to.put(block_section(disk), VERSION, &transport.save());
        }
        Ok(to)
    }

    /// Moves the RAM pages that were written since the last harvest into `into`, a set of this
    /// machine's layout. May be called while the guest runs. After an error nothing is lost: what
    /// was not moved is still marked.
    pub fn harvest(&self, into: &mut PageSet) -> Result<(), VmmError> {
        self.vm.harvest(into)
    }

    /// Looks for what other programs did to the disks' files: their pages count as changed, and what
    /// is new is returned in words.
    pub fn look_at_disks(&self) -> Vec<String> {
        self.watch.look()
    }

    /// Its memory.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Its disks, in the order of the description, read-only ones included.
    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.disks
    }

    /// The content that checkpoints cover.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What the guest is doing.
    pub fn run_state(&self) -> RunState {
        self.gate.state()
    }

    /// Waits until the state differs from `seen`, at most `timeout`, and returns it.
    pub fn wait_change(&self, seen: &RunState, timeout: Duration) -> RunState {
        self.gate.wait_change(seen, timeout)
    }

    /// The serial port.
    pub fn console(&self) -> Console {
        self.console.clone()
    }

    /// The guest cannot go on. The first cause counts. Does not wait.
    pub fn fail(&self, cause: impl Into<String>) {
        self.gate.fail(cause);
    }

    /// Ends the guest for good: threads end, disks are flushed and unlocked. RAM stays readable.
    pub fn stop(&self) {
        let mut threads = self.control();
        if std::mem::replace(&mut threads.stopped, true) {
            return;
        }
        let state = RunState::Stopped("stopped on request".into());
        if self.gate.stop(state) {
            for thread in threads.vcpus.drain(..) {
                // A panic was reported through the gate.
                let _ = thread.join();
            }
        } else {
            tracing::error!(guest = %self.spec.guest, "a vCPU thread does not end; it is left behind");
        }
        for (thread, device) in threads.devices.drain(..).zip(&self.bus.virtio) {
            let idle = device.hold();
            device.exit();
            match idle {
                Ok(()) => {
                    let _ = thread.join();
                }
                Err(error) => {
                    tracing::error!(guest = %self.spec.guest, %error, "its thread is left behind");
                }
            }
        }
        for disk in &self.disks {
            if disk.region().is_some()
                && let Err(error) = disk.flush()
            {
                let path = disk.path().display();
                tracing::error!(guest = %self.spec.guest, %path, %error, "a disk could not be flushed at the end of the guest");
            }
            disk.unlock();
        }
        self.console.close();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn block_section(disk: &Disk) -> String {
    format!("virtio-blk.{}", disk.id())
}

fn open_disks(spec: &MachineSpec, layout: &Layout) -> Result<Vec<Arc<Disk>>, VmmError> {
    let mut next = layout.ram_regions() as u16;
    let mut disks = Vec::with_capacity(spec.disks.len());
    for disk in &spec.disks {
        let region = (!disk.read_only).then_some(RegionId(next));
        next += u16::from(!disk.read_only);
        let opened = Disk::open(disk, region)?;
        let planned = region.and_then(|id| layout.get(id));
        if planned.is_some_and(|r| r.pages != opened.pages()) {
            return Err(VmmError::Spec(format!(
                "the file of disk {:?} changed its size while it was opened",
                disk.id
            )));
        }
        disks.push(opened);
    }
    Ok(disks)
}

fn devices(
    first: &mut First,
    disks: &[Arc<Disk>],
    ram: &Arc<GuestRam>,
    vm: &Vm,
    gate: &Arc<Gate>,
    console: &Console,
) -> Result<Bus, VmmError> {
    let mut virtio = Vec::with_capacity(disks.len());
    for (irq, disk) in (VIRTIO_IRQ..).zip(disks) {
        let line = Arc::new(IrqLine::new(vm, irq));
        let device = VirtioMmio::new(block::kind(disk), ram.clone(), line, gate.clone());
        if let First::Restore(state) = first {
            device.restore(state.take(&block_section(disk), VERSION)?)?;
        }
        virtio.push(Arc::new(device));
    }
    let (registers, genid) = match first {
        First::Boot(_) => (None, GenId::new()?),
        First::Restore(state) => {
            let genid: GenId = state.take("genid", VERSION)?;
            (Some(state.take("serial", VERSION)?), genid.after_restore()?)
        }
    };
    let line = Arc::new(IrqLine::new(vm, COM1_IRQ));
    Ok(Bus {
        serial: SerialPort::new(registers, line, gate.clone(), console)?,
        virtio,
        genid,
    })
}

/// Creates the vCPUs and gives them their first or saved state.
fn vcpus_of(
    spec: &MachineSpec,
    vm: &Vm,
    first: &mut First,
) -> Result<Vec<(VcpuFd, VcpuCapture)>, VmmError> {
    let mut fds = Vec::with_capacity(spec.vcpus as usize);
    let mut msrs = None;
    for index in 0..spec.vcpus {
        let number = index as usize;
        let fd = vm.create_vcpu(number)?;
        let cpuid = match first {
            First::Boot(entry) => {
                let cpuid = cpuid::for_vcpu(&vm.supported, index, spec.vcpus);
                fd.set_cpuid2(&cpuid)
                    .map_err(|e| VmmError::kvm(format!("CPUID of vCPU {index}"), e))?;
                entry.init(number, &fd)?;
                cpuid
            }
            First::Restore(state) => {
                let saved = state::take_vcpu(number, state)?;
                saved.restore(number, &fd, vm)?;
                saved.cpuid().clone()
            }
        };
        let msrs = msrs.get_or_insert_with(|| state::readable_msrs(&fd, vm));
        let capture = VcpuCapture::new(&fd, cpuid, msrs)?;
        fds.push((fd, capture));
    }
    Ok(fds)
}

#[cfg(test)]
mod tests;
