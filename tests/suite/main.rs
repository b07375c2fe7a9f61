//! End to end: the real program as two sites on loopback, with real guests.
//!
//! ```text
//!   harness/      two sites in a temporary directory, their processes, a link that can be cut
//!   failover      kill -9 in mid-epoch, refusals, an old owner that returns
//!   restart       daemons that end or are killed under a running guest
//!   link          a link that is cut, or stalls
//!   cut_off       a first copy that is cut off goes on where it stopped
//!   quiesce       checkpoints of applications at rest
//!   bandwidth     a limit of what is sent over it
//!   pace          how checkpoints come: what binds, budgets, a guest that is slowed down
//!   bench         measurements in quick runs, beside QEMU
//!   events        what happened, kept and told to a program
//!   kills         random kills; LIFEBOAT_KILLS=200 for a long run, LIFEBOAT_SEED=N to replay one
//!   warm          a monitor that waits at the standby, fed with every checkpoint
//!   rot           flipped bits in a journal
//!   aborts        moves and failovers cut off at each step; LIFEBOAT_ABORTS=all for all of them
//!   doctor        two sites compared by what they tell each other
//!   balance       load is evened out between two sites
//!   bad_input     what an operator or a stranger can get wrong
//!   monitor       one guest's process: cuts, kills of its daemon, restore, signals
//!   bundle        what is in a bundle for support, and what is not
//!   cli           every verb: its JSON, its exit codes
//!   plans         a disaster in the order of a plan, cut off and resumed; evacuation
//!   observability rules, dashboards, and what Prometheus sees of two sites
//!   seeds         the first copy in a file, and only differences over the link
//!   page          the status page in a browser without a window; LIFEBOAT_PICTURES=DIR keeps pictures of it
//!   runbooks      every command of the runbooks, executed
//!   nbd           exports of disks and recovery points, read and written by qemu-img and nbdcopy
//!   flush         one flush per commit, counted by strace
//!   qemu/         stock QEMU: checkpoints, kills, resumed guests; watchdog; LIFEBOAT_QEMU_KILLS=200 for a
//!                 long run of kills of its daemon, LIFEBOAT_LINUX_KILLS=50 for one of kills of a Linux guest
//!                 with its daemon; LIFEBOAT_SEED=N to replay one
//!   package       what the Debian package is made of
//!   readme        README and command line say the same
//! ```
//!
//! Tests with guests print `skipped: NAME: WHY` and pass where there is no usable /dev/kvm.

mod aborts;
mod bad_input;
mod balance;
mod bandwidth;
mod bench;
mod bundle;
mod cli;
mod cut_off;
mod doctor;
mod drills;
mod events;
mod failover;
mod flush;
mod groups;
mod harness;
mod kills;
mod link;
mod monitor;
mod moving;
mod nbd;
mod observability;
mod pace;
mod package;
mod page;
mod plans;
mod qemu;
mod quiesce;
mod readme;
mod reprotect;
mod restart;
mod rot;
mod runbooks;
mod seeds;
mod warm;
