//! The places of devices that come while the guest runs, wired to KVM as they come and unwired as they
//! go (docs/adr/0023).

use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::builder::NamedCounters;
use super::report::Reporter;
use crate::GuestMemory;
use crate::devices::Line;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::mmio::MmioTransport;
use crate::devices::virtio::mmio::slot::Slot;
use crate::devices::virtio::mmio::window::Window;

/// Why a device cannot come or go.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// All places are taken.
    #[error("all {count} places for devices that are added to a running VM are taken")]
    Full {
        /// How many there are.
        count: usize,
    },
    /// No device that came later has this name.
    #[error("no device {name} was added to the running VM")]
    NotFound {
        /// The name.
        name: String,
    },
    /// The host has no eventfd left.
    #[error("cannot make device {name}")]
    Device {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// KVM refused a step.
    #[error("KVM refused to {step}")]
    Kvm {
        /// The step.
        step: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// One of them.
struct Place {
    /// The device's number, by which the guest's driver knows the place.
    number: u32,
    address: u64,
    window: Window,
    slot: Arc<Mutex<Slot>>,
    occupant: Option<Occupant>,
}

/// What is known of the device in a place.
struct Occupant {
    counters: NamedCounters,
    /// The queues' notifications, as KVM knows them.
    kicks: Vec<EventFd>,
}

/// All of them. Their devices share one interrupt line.
pub struct Slots {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    reporter: Reporter,
    line: Arc<dyn Line>,
    /// Where the guest's acknowledgements of interrupts end.
    acks: Arc<EventFd>,
    places: Vec<Place>,
}

impl Slots {
    /// None yet; their devices will interrupt by `line`.
    #[must_use]
    pub fn new(
        vm: Arc<VmFd>,
        memory: GuestMemory,
        reporter: Reporter,
        line: Arc<dyn Line>,
        acks: Arc<EventFd>,
    ) -> Slots {
        Slots { vm, memory, reporter, line, acks, places: Vec::new() }
    }

    /// Adds an empty place for device `number`. Returns what answers on the bus at `address`.
    pub fn push(&mut self, number: u32, address: u64, window: Window) -> Arc<Mutex<Slot>> {
        let slot = Arc::new(Mutex::new(Slot::new(window.clone())));
        self.places.push(Place { number, address, window, slot: slot.clone(), occupant: None });
        slot
    }

    /// Makes `device` one that the guest can find. Returns its number.
    ///
    /// # Errors
    /// See [`SlotError`]. The device is gone then.
    pub fn add(&mut self, device: Box<dyn VirtioDevice>) -> Result<u32, SlotError> {
        let name = device.name().to_owned();
        let count = self.places.len();
        let free = self.places.iter_mut().find(|place| place.occupant.is_none());
        let place = free.ok_or(SlotError::Full { count })?;
        let failed = |source| SlotError::Device { name: name.clone(), source };
        let at = (place.window.clone(), self.line.clone());
        let transport = MmioTransport::new(self.memory.clone(), device, self.reporter.clone(), at);
        let transport = transport.map_err(failed)?;
        let kicks = transport.queue_kicks().iter().map(EventFd::try_clone);
        let kicks = kicks.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let counters = (name, transport.counters());
        lock(&place.slot).fill(transport);
        place.occupant = Some(Occupant { counters, kicks });
        let (number, address) = (place.number, place.address);
        if let Err(error) = wire(&self.vm, &self.acks, &kicks_of(place), address) {
            // KVM has no room for them. What was registered goes with the place.
            vacate(&self.vm, &self.acks, place);
            return Err(error);
        }
        Ok(number)
    }

    /// Takes a device away that was added here. The guest should have let go of it: what it still asks
    /// for is not answered. Blocks for as long as the host takes for the request that the device is at.
    ///
    /// # Errors
    /// [`SlotError::NotFound`].
    pub fn remove(&mut self, name: &str) -> Result<(), SlotError> {
        let is_it = |place: &&mut Place| {
            place.occupant.as_ref().is_some_and(|occupant| occupant.counters.0 == name)
        };
        let place = self.places.iter_mut().find(is_it);
        let place = place.ok_or_else(|| SlotError::NotFound { name: name.to_owned() })?;
        vacate(&self.vm, &self.acks, place);
        Ok(())
    }

    /// Counters of the devices that are there.
    pub fn counters(&self) -> impl Iterator<Item = &NamedCounters> {
        self.places.iter().filter_map(|place| place.occupant.as_ref()).map(|it| &it.counters)
    }
}

fn lock(slot: &Mutex<Slot>) -> std::sync::MutexGuard<'_, Slot> {
    // As on the bus: its state is consistent between calls.
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kicks_of(place: &Place) -> Vec<&EventFd> {
    place.occupant.iter().flat_map(|occupant| &occupant.kicks).collect()
}

/// Empties a place.
fn vacate(vm: &VmFd, acks: &EventFd, place: &mut Place) {
    unwire(vm, acks, &kicks_of(place), place.address);
    lock(&place.slot).clear();
    place.occupant = None;
}

/// The eventfds of a device at `address`: one for each queue, and one for the acknowledgements.
fn notifications<'a>(
    acks: &'a EventFd,
    kicks: &[&'a EventFd],
    address: u64,
) -> Vec<(&'a EventFd, IoEventAddress, u32)> {
    let (ack, used_ring) = MmioTransport::USED_RING_ACK;
    let at = |offset| IoEventAddress::Mmio(address.saturating_add(offset));
    let mut all = vec![(acks, at(ack), used_ring)];
    all.extend(
        (0_u32..).zip(kicks).map(|(queue, kick)| (*kick, at(MmioTransport::QUEUE_NOTIFY), queue)),
    );
    all
}

/// Has KVM signal a device's eventfds itself.
pub(super) fn wire(
    vm: &VmFd,
    acks: &EventFd,
    kicks: &[&EventFd],
    address: u64,
) -> Result<(), SlotError> {
    for (event, at, value) in notifications(acks, kicks, address) {
        vm.register_ioevent(event, &at, value).map_err(|source| SlotError::Kvm {
            step: "register a device's notification",
            source,
        })?;
    }
    Ok(())
}

/// Takes back what [`wire`] did, or a part of it.
fn unwire(vm: &VmFd, acks: &EventFd, kicks: &[&EventFd], address: u64) {
    for (event, at, value) in notifications(acks, kicks, address) {
        if let Err(error) = vm.unregister_ioevent(event, &at, value) {
            // It was not registered.
            tracing::debug!(%error, address, "a notification was not there");
        }
    }
}
