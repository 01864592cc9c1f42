"""Packed attention on a CPU by aten's flash attention, whatever the length; the reference has it from 65 tokens on."""

from kernels.packed_attention.reference import cpu_flash_backward, cpu_flash_forward, on_cpus

forward, backward = on_cpus(
    cpu_flash_forward, cpu_flash_backward, "flash is aten's attention for CPUs; on a GPU the reference is it"
)
