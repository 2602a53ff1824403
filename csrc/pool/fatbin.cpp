// The compiled CUDA kernels, embedded as bytes, in the section where NVIDIA's tools look for them.
asm(".section .nv_fatbin, \"a\"\n"
    ".balign 64\n"
    ".global lsp_fatbin\n"
    ".hidden lsp_fatbin\n"
    "lsp_fatbin:\n"
    ".incbin \"" LORASERVE_FATBIN
    "\"\n"
    ".previous\n");
