//! The VM's file descriptor: creation, memory slots, interrupt lines, dirty log.
//!
//! KVM keeps the dirty log of vCPU writes (and of its own, e.g. kvmclock pages) from the creation on;
//! reading a slot's log clears it. The log has every written page, and also each page once when KVM
//! first maps it, even for a read (it maps it writable at once). The dirty *ring* is not used: with
//! emulated guests it loses pages.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY,
    kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::bitmap::{PageBitmap, PageSet};
use crate::vmm::devices::Interrupt;
use crate::vmm::{GuestRam, VmmError};

/// KVM's own three pages, below the BIOS area that no guest of ours has.
const TSS_GPA: usize = 0xfffb_d000;
/// KVM's identity map page.
const IDENTITY_MAP_GPA: u64 = 0xfffb_c000;
/// Largest XSAVE area that the saved state has room for, in bytes.
const XSAVE_BYTES_MAX: i32 = 4096;

/// What the monitor cannot do without.
const CAPS: [(Cap, &str); 12] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
];

/// One VM with its memory, interrupt controllers and PIT, but no vCPU.
pub(crate) struct Vm {
    pub fd: Arc<VmFd>,
    /// CPUID as this host and its KVM can offer it.
    pub supported: CpuId,
    /// MSRs that hold state, as KVM lists them.
    pub msrs: Vec<u32>,
    // KVM reads guest memory through these mappings as long as the VM lives.
    ram: Arc<GuestRam>,
}

impl Vm {
    /// Creates the VM over `ram`.
    pub fn new(ram: &Arc<GuestRam>) -> Result<Vm, VmmError> {
        let os = |e: kvm_ioctls::Error| io::Error::from_raw_os_error(e.errno());
        let kvm = Kvm::new().map_err(|e| VmmError::NoKvm(os(e)))?;
        check_host(&kvm)?;
        let fd = create_vm(&kvm)?;
        fd.set_tss_address(TSS_GPA)
            .map_err(|e| VmmError::kvm("its TSS address", e))?;
        fd.set_identity_map_address(IDENTITY_MAP_GPA)
            .map_err(|e| VmmError::kvm("its identity map address", e))?;
        fd.create_irq_chip()
            .map_err(|e| VmmError::kvm("interrupt controllers", e))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit)
            .map_err(|e| VmmError::kvm("a timer (PIT)", e))?;
        for range in ram.ranges() {
            let region = kvm_userspace_memory_region {
                slot: u32::from(range.region.0),
                flags: KVM_MEM_LOG_DIRTY_PAGES,
                guest_phys_addr: range.gpa,
                memory_size: range.bytes() as u64,
                userspace_addr: range.hva as u64,
            };
            // SAFETY: the range is mapped as long as `ram`, which this value keeps; KVM's slots end
            // with the VM.
            unsafe { fd.set_user_memory_region(region) }
                .map_err(|e| VmmError::kvm(format!("memory slot {}", region.slot), e))?;
        }
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|e| VmmError::kvm("its list of CPU features", e))?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(|e| VmmError::kvm("its list of MSRs", e))?;
        Ok(Vm {
            fd: Arc::new(fd),
            supported,
            msrs: msrs.as_slice().to_vec(),
            ram: ram.clone(),
        })
    }

    /// Creates vCPU number `index`.
    pub fn create_vcpu(&self, index: usize) -> Result<VcpuFd, VmmError> {
        self.fd
            .create_vcpu(index as u64)
            .map_err(|e| VmmError::kvm(format!("vCPU {index}"), e))
    }

    /// Moves the pages that vCPUs and the host wrote since the last call into `into`.
    pub fn harvest(&self, into: &mut PageSet) -> Result<(), VmmError> {
        for range in self.ram.ranges() {
            let slot = u32::from(range.region.0);
            let words = self
                .fd
                .get_dirty_log(slot, range.bytes())
                .map_err(|e| VmmError::kvm(format!("the dirty log of slot {slot}"), e))?;
            let log = PageBitmap::from_words(words, range.pages);
            let log = log.expect("KVM's log has a bit per page");
            into.region_mut(range.region).union(&log);
        }
        self.ram.harvest(into);
        Ok(())
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, VmmError> {
    // A signal to this process interrupts the creation; it is then simply asked for again.
    for _ in 0..100 {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => continue,
            result => return result.map_err(|e| VmmError::kvm("a VM", e)),
        }
    }
    let error = kvm_ioctls::Error::new(libc::EINTR);
    Err(VmmError::kvm("a VM", error))
}

fn check_host(kvm: &Kvm) -> Result<(), VmmError> {
    let lacking = |what: String| VmmError::NoKvm(io::Error::new(io::ErrorKind::Unsupported, what));
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(lacking(format!("API version {version}, not 12")));
    }
    for (cap, name) in CAPS {
        if !kvm.check_extension(cap) {
            return Err(lacking(format!("it lacks {name}")));
        }
    }
    let xsave = kvm.check_extension_int(Cap::Xsave2);
    if xsave > XSAVE_BYTES_MAX {
        return Err(lacking(format!(
            "its vCPUs have {xsave} bytes of XSAVE state; at most {XSAVE_BYTES_MAX} can be saved"
        )));
    }
    Ok(())
}

/// An input of the interrupt controllers.
pub(crate) struct IrqLine {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl IrqLine {
    /// Input `gsi` of `vm`.
    pub fn new(vm: &Vm, gsi: u32) -> Self {
        Self {
            vm: vm.fd.clone(),
            gsi,
        }
    }
}

impl Interrupt for IrqLine {
    // Not an irqfd: that delivers from a kernel work item, possibly after the guest's interrupt
    // controllers were saved, and the interrupt would be lost with a failover.
    fn pulse(&self) -> io::Result<()> {
        let set = |active| {
            self.vm
                .set_irq_line(self.gsi, active)
                .map_err(|e| io::Error::from_raw_os_error(e.errno()))
        };
        set(true)?;
        set(false)
    }
}
