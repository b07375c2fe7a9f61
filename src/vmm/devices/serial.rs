//! Serial port COM1: a 16550 between the guest and a [`Console`].
//!
//! Held with the other devices, because input from the console raises interrupts: while it is held,
//! input waits in the console.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, SerialState, Trigger};

use crate::vmm::devices::Interrupt;
use crate::vmm::gate::Gate;
use crate::vmm::{Console, VmmError};

/// First of the eight ports.
pub(crate) const COM1_PORT: u16 = 0x3f8;
/// Its interrupt line.
pub(crate) const COM1_IRQ: u32 = 4;

/// What is saved: the registers of vm-superio's model, in a layout of our own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl From<SerialState> for Registers {
    fn from(s: SerialState) -> Self {
        Self {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.in_buffer,
        }
    }
}

impl From<Registers> for SerialState {
    fn from(r: Registers) -> Self {
        Self {
            baud_divisor_low: r.baud_divisor_low,
            baud_divisor_high: r.baud_divisor_high,
            interrupt_enable: r.interrupt_enable,
            interrupt_identification: r.interrupt_identification,
            line_control: r.line_control,
            line_status: r.line_status,
            modem_control: r.modem_control,
            modem_status: r.modem_status,
            scratch: r.scratch,
            in_buffer: r.in_buffer,
        }
    }
}

struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.pulse()
    }
}

struct ToConsole(Console);

impl io::Write for ToConsole {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.put_output(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Inner {
    uart: Serial<Line, NoEvents, ToConsole>,
    held: bool,
}

/// The serial port.
pub(crate) struct SerialPort {
    inner: Mutex<Inner>,
    console: Console,
    gate: Arc<Gate>,
}

impl SerialPort {
    /// A port in its first state, or in a saved one. It is held.
    pub fn new(
        saved: Option<Registers>,
        line: Arc<dyn Interrupt>,
        gate: Arc<Gate>,
        console: &Console,
    ) -> Result<Arc<Self>, VmmError> {
        let state = saved.map_or_else(SerialState::default, SerialState::from);
        let output = ToConsole(console.clone());
        let uart = Serial::from_state(&state, Line(line), NoEvents, output)
            .map_err(|e| VmmError::Spec(format!("the saved serial port is unusable: {e}")))?;
        let port = Arc::new(Self {
            inner: Mutex::new(Inner { uart, held: true }),
            console: console.clone(),
            gate,
        });
        let weak = Arc::downgrade(&port);
        console.on_input(move || {
            if let Some(port) = weak.upgrade() {
                port.pump(&mut port.lock());
            }
        });
        Ok(port)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest writes register `offset` (0 to 7).
    pub fn write(&self, offset: u8, value: u8) {
        if let Err(error) = self.lock().uart.write(offset, value) {
            self.gate.fail(format!("serial port: {error}"));
        }
    }

    /// The guest reads register `offset` (0 to 7).
    pub fn read(&self, offset: u8) -> u8 {
        let mut inner = self.lock();
        let value = inner.uart.read(offset);
        if offset == 0 {
            self.pump(&mut inner);
        }
        value
    }

    /// Moves input from the console into the port's FIFO as far as there is room.
    fn pump(&self, inner: &mut Inner) {
        if inner.held {
            return;
        }
        let input = self.console.take_input(inner.uart.fifo_capacity());
        if !input.is_empty()
            && let Err(error) = inner.uart.enqueue_raw_bytes(&input)
        {
            self.gate.fail(format!("serial port: {error}"));
        }
    }

    /// Lets no input in until `release`.
    pub fn hold(&self) {
        self.lock().held = true;
    }

    /// Lets input in again.
    pub fn release(&self) {
        let mut inner = self.lock();
        inner.held = false;
        self.pump(&mut inner);
    }

    /// The registers, to be saved.
    pub fn save(&self) -> Registers {
        self.lock().uart.state().into()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Interrupt for Count {
        fn pulse(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    fn port(saved: Option<Registers>) -> (Arc<SerialPort>, Console, Arc<Count>) {
        let (console, line) = (Console::default(), Arc::new(Count::default()));
        let gate = Arc::new(Gate::new(0, Box::new(|| unreachable!("no vCPU"))));
        let port = SerialPort::new(saved, line.clone(), gate, &console).unwrap();
        (port, console, line)
    }

    #[test]
    fn bytes_go_both_ways_and_input_waits_while_held() {
        let (port, console, line) = port(None);
        port.write(1, 1); // interrupt on received data
        assert_eq!(console.input(b"hi"), 2);
        assert_eq!((port.read(5) & 1, line.0.load(Ordering::SeqCst)), (0, 0));
        port.release();
        assert_eq!((port.read(5) & 1, line.0.load(Ordering::SeqCst)), (1, 1));
        assert_eq!((port.read(0), port.read(0)), (b'h', b'i'));
        "ok".bytes().for_each(|b| port.write(0, b));
        let chunk = console.output().next(Duration::ZERO).unwrap();
        assert_eq!(chunk.bytes, b"ok");
    }

    #[test]
    fn more_input_than_the_fifo_holds_arrives_in_order() {
        let (port, console, _) = port(None);
        port.release();
        let sent: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        assert_eq!(console.input(&sent), 1000);
        let mut got = Vec::new();
        while port.read(5) & 1 == 1 {
            got.push(port.read(0));
        }
        assert_eq!(got, sent);
    }

    #[test]
    fn registers_survive_a_save() {
        let (first, console, _) = port(None);
        first.release();
        first.write(7, 0x5a);
        first.write(1, 1);
        console.input(b"xyz");
        let saved = first.save();
        let bytes = postcard::to_stdvec(&saved).unwrap();
        let (second, _, _) = port(Some(postcard::from_bytes(&bytes).unwrap()));
        assert_eq!(second.save(), saved);
        assert_eq!((second.read(7), second.read(0)), (0x5a, b'x'));
        let mut bad = saved;
        bad.in_buffer = vec![0; 1000];
        let gate = Arc::new(Gate::new(0, Box::new(|| unreachable!("no vCPU"))));
        let made = SerialPort::new(
            Some(bad),
            Arc::new(Count::default()),
            gate,
            &Console::default(),
        );
        assert!(made.is_err());
    }
}
