// Programmatic dependent launch: a kernel whose LaunchShape says so may start before the one before it has ended.
#pragma once
#include "common/ptx/sm90.cuh"

namespace nxs {

// griddepcontrol.wait: until the kernel before has ended and its writes are visible. Nothing that it wrote may be read,
// and nothing that it reads written, before. Every kernel of a chain waits. No effect in an ordinary launch.
NXS_DEVICE void programmatic_wait() { NXS_SM90("griddepcontrol.wait;" :: : "memory"); }
// griddepcontrol.launch_dependents: the next kernel may start once every block has said so or ended.
NXS_DEVICE void programmatic_trigger() { NXS_SM90("griddepcontrol.launch_dependents;" :: : "memory"); }

}  // namespace nxs
